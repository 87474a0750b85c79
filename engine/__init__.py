"""Generating tokens for requests: batching, KV blocks, sampling. Token ids only, no text.

Owns the schedule, the KV cache and the step loop; never touches files, text or the terminal.
The main class is `Engine`. Only `Engine` needs torch, which is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

import model  # noqa: F401  before torch: it sets how OpenMP threads wait and filters a warning
from engine.config import EngineConfig
from engine.errors import EngineError, RequestError
from engine.request import Completion, Request, SamplingParams, TokenLogprobs
from engine.stats import EngineStats
from engine.summary import ReplicaSummary, RunSummary

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "ReplicaSummary",
    "Request",
    "RequestError",
    "RunSummary",
    "SamplingParams",
    "TokenLogprobs",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
