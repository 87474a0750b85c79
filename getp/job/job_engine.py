"""The interface of an engine that runs a job's requests: an `Engine` or a `Cluster`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch

from engine import Completion, EngineConfig, EngineStats, Request, RunSummary
from model import ModelConfig


class JobEngine(Protocol):
    """Runs requests. `finish` frees its resources; `warm_up` can make it ready again."""

    @property
    def config(self) -> EngineConfig:
        """Return the settings as given."""

    @property
    def model_config(self) -> ModelConfig:
        """Return the config of the checkpoint."""

    @property
    def max_positions(self) -> int:
        """Return the longest request, prompt included; known after `warm_up`."""

    @property
    def device(self) -> torch.device:
        """Return the device; for replicas, the type of their devices."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the compute dtype."""

    @property
    def kv_dtype(self) -> str:
        """Return the dtype of the KV cache, as in EngineConfig but never auto."""

    def choose_kernels(self, preferred: Mapping[str, Any] | None, expected_s: float | None) -> None:
        """Choose the kernels, those of an earlier part of the job if possible; see Engine."""

    @property
    def rounding(self) -> Mapping[str, Any]:
        """Return what the rounding of results depends on besides checkpoint and dtype."""

    @property
    def stats(self) -> EngineStats:
        """Return the counters so far."""

    def warm_up(self) -> None:
        """Load the model and prepare the first step."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Run the requests; yield completions in any order."""

    def finish(self) -> None:
        """Free memory and processes."""

    def summary(self) -> RunSummary:
        """Return the data for the report; also valid after `finish`."""
