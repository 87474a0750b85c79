"""The inference engine: requests of token ids → completions, with continuous batching.

Owns scheduling, the KV cache, the execution of steps, sampling and tensor parallelism. Never
touches text, input and result files, or the terminal; it reads a checkpoint only through `model`.
The main class is `Engine`. Only `Engine` needs torch, which is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

import model  # noqa: F401  before torch: sets how OpenMP threads wait and filters a warning
from engine.config import EngineConfig
from engine.errors import EngineError, GrammarError, RequestError
from engine.grammar import Grammar
from engine.request import Completion, Request, TokenLogprobs
from engine.sampling_params import SamplingParams, ThinkingBudget
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
    "Grammar",
    "GrammarError",
    "ReplicaSummary",
    "Request",
    "RequestError",
    "RunSummary",
    "SamplingParams",
    "ThinkingBudget",
    "TokenLogprobs",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
