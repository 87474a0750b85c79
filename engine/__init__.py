"""How requests become tokens: batching, KV blocks, sampling. Knows ids, not text.

Owns the schedule, the KV cache and the step loop; never touches files, text or the terminal.
The main class is `Engine`.
"""

from engine.engine import Engine, EngineError, EngineStats
from engine.request import Completion, Request, SamplingParams, TokenLogprobs

__all__ = [
    "Completion",
    "Engine",
    "EngineError",
    "EngineStats",
    "Request",
    "SamplingParams",
    "TokenLogprobs",
]
