"""Input and output of the engine: requests, sampling parameters, completions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.errors import EngineError, RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are sampled and when it ends.

    A request ends at the first of: a stop id (kept in the output), `max_new_tokens`,
    `max_positions` (prompt included), the model's own limit. Raises EngineError for a value that is
    out of range.
    """

    temperature: float = 0.0  # 0: greedy; top_k, top_p and seed have no effect then
    top_k: int = 0  # 0: keep every token
    top_p: float = 1.0  # nucleus: the smallest set of tokens with at least this probability
    seed: int = 0  # the same seed gives the same tokens, in any batch
    max_new_tokens: int | None = None
    max_positions: int | None = None
    stop_ids: frozenset[int] = frozenset()  # in addition to the checkpoint's own
    ignore_eos: bool = False  # ignore the checkpoint's own stop ids (`stop_ids` still count)
    # None: no log-probabilities; n: those of the sampled token and of the n most likely tokens
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raise EngineError naming the first parameter that is out of range."""
        if not 0 <= self.temperature < float("inf"):
            raise _out_of_range("temperature", "0 or more", self.temperature)
        if not 0 < self.top_p <= 1:
            raise _out_of_range("top_p", "above 0 and at most 1", self.top_p)
        if self.top_k < 0:
            raise _out_of_range("top_k", "0 (all tokens) or more", self.top_k)
        for name in ("max_new_tokens", "max_positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _out_of_range(name, "1 or more", value)
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise _out_of_range("logprobs", "from 0 to 20", self.logprobs)


def _out_of_range(parameter: str, allowed: str, value: float) -> EngineError:
    return EngineError(
        f"{{{parameter}}} must be {{allowed}}, not {{value}}", allowed=allowed, value=value
    )


@dataclass(frozen=True)
class Request:
    """One prompt, as token ids, and how to continue it.

    `on_token` is called with each new token id as soon as it is known, stop tokens included. If it
    returns True, the request ends (finish reason "stop"). Streaming and stop strings are built on
    it, as the engine does not handle text.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: int = 0  # chosen by the caller; copied to the completion
    on_token: Callable[[int], bool | None] | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities at one output position, before temperature and truncation."""

    logprob: float  # of the sampled token
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), most likely first


@dataclass(frozen=True)
class Completion:
    """The result of one request. Times are seconds on `time.perf_counter`'s clock."""

    request_id: int
    token_ids: list[int]  # output only; ends with the stop token, if one ended it
    finish_reason: FinishReason
    error: RequestError | None = None  # set when finish_reason is "error"
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    logprobs: list[TokenLogprobs] | None = None
    arrived: float = 0.0  # when the engine took the request
    first_token: float = 0.0  # when the first output token was known
    finished: float = 0.0
