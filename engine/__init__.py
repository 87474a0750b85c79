"""How requests become tokens: batching, KV blocks, sampling. Knows ids, not text.

Owns the schedule, the KV cache and the step loop; never touches files, text or the terminal.
The main class is `Engine`.
"""

import model  # noqa: F401  before torch: it says how threads wait, and what is no warning
from engine.config import EngineError
from engine.engine import Engine
from engine.request import Completion, Request, SamplingParams, TokenLogprobs
from engine.stats import EngineStats

__all__ = [
    "Completion",
    "Engine",
    "EngineError",
    "EngineStats",
    "Request",
    "SamplingParams",
    "TokenLogprobs",
]
