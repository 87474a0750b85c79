"""How requests become tokens: batching, KV blocks, sampling. Knows ids, not text.

Owns the schedule, the KV cache and the step loop; never touches files, text or the terminal.
The main class is `Engine`.
"""

import warnings

import model  # noqa: F401  before torch: it says how threads wait

# torch says so at import where NumPy is not installed; nothing here needs it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

from engine.engine import Engine  # noqa: E402
from engine.request import Completion, Request, SamplingParams, TokenLogprobs  # noqa: E402
from engine.settings import EngineError  # noqa: E402
from engine.stats import EngineStats  # noqa: E402

__all__ = [
    "Completion",
    "Engine",
    "EngineError",
    "EngineStats",
    "Request",
    "SamplingParams",
    "TokenLogprobs",
]
