"""CoordinatorRunner: rank 0's runner, which repeats each of its calls on the other ranks.

Rank 0 is the process with the engine: it schedules, samples, and sends each step to the other
ranks. Each of them runs `worker.run`: a ModelRunner on its share of the model.

    rank 0:  schedule → send the step → compute own share ⇄ exchange ⇄ → tokens
    others:          receive the step → compute own share ⇄ exchange ⇄
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.execution.capture import Capture, CaptureMode
from engine.execution.model_runner import ModelRunner
from engine.execution.sampler import Sampled
from engine.execution.scoring import Targets
from engine.parallel.step_message import StepMessage
from engine.parallel.worker_pool import WorkerPool
from engine.resolve import dtype_name
from engine.sampling_params import SamplingParams
from model import ModelConfig
from model.adapters import AdapterList


class CoordinatorRunner(ModelRunner):
    """Rank 0's runner; the workers' runners receive the same calls."""

    def __init__(
        self, config: ModelConfig, device: torch.device, dtype: torch.dtype, workers: WorkerPool
    ):
        super().__init__(config, device, dtype, workers.shard)
        self._workers = workers

    def connect(
        self, checkpoint: Path, quantize: str | None, adapters: AdapterList, threads: int
    ) -> None:
        """Start the workers and create a runner on each; threads: per worker, on a CPU.

        quantize: as in EngineConfig. adapters: none if their changes are not loaded.
        """
        self._workers.start(self.device)
        self.shard = self._workers.shard
        dtypes = dtype_name(self.dtype), self.config.kv_dtype
        args = (str(checkpoint), *dtypes, quantize, adapters, threads)
        self._workers.call("make_runner", args, lambda: None)

    def set_kernels(self, choices: Mapping[str, Any]) -> None:
        """ModelRunner.set_kernels on every rank."""
        self._on_all("set_kernels", choices)

    def load(self, checkpoint: Path, dummy: bool, adapters: AdapterList = ()) -> None:
        """ModelRunner.load on every rank."""
        self._on_all("load", checkpoint, dummy, adapters)

    def available(self) -> int:
        """Bytes that every rank can still allocate."""
        channel = self._workers.channel
        assert channel is not None
        return int(self._workers.call("available", (), channel.available))

    def allocate(self, *sizes: int) -> None:
        """ModelRunner.allocate on every rank."""
        self._on_all("allocate", *sizes)

    def run_peak_step(self, *sizes: int) -> None:
        """ModelRunner.run_peak_step on every rank."""
        super().run_peak_step(*sizes)  # which allocates and computes on all of them
        self._on_all("deallocate")

    def capture(
        self,
        capture: Capture,
        mode: CaptureMode = CaptureMode.WHOLE,
        max_batch_tokens: int = 0,
    ) -> None:
        """ModelRunner.capture on every rank, or on none if one of them cannot capture.

        Every rank prepares first: capturing exchanges tensors, so the others would wait forever for
        a rank that fails before.
        """
        channel = self._workers.channel
        assert channel is not None
        self.exchange_reports = channel.gather_reports
        self._workers.call("prepare_capture", (), lambda: None)
        own = ModelRunner.capture
        try:
            args = mode, max_batch_tokens
            self._workers.call("capture", args, lambda: own(self, capture, *args))
        except Exception:
            if self._workers.channel is not None:
                self._on_all("uncapture")
            raise

    def compute(
        self,
        message: StepMessage,
        non_greedy: Mapping[int, SamplingParams],
        before_sampling: Callable[[], None] | None = None,
        targets: Targets | None = None,
    ) -> Sampled:
        """ModelRunner.compute on every rank."""
        with self._workers.collective():
            self._workers.send_step(message)
            return super().compute(message, non_greedy, before_sampling, targets)

    def free(self) -> None:
        """ModelRunner.free on every rank; workers that cannot receive a message are killed."""
        if self._workers.ready:
            self._on_all("free")
        else:
            super().free()
            self._workers.close()

    def _on_all(self, name: str, *args: Any) -> None:
        own = getattr(ModelRunner, name)
        self._workers.call(name, args, lambda: own(self, *args))
