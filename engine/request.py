"""Input and output of the engine: requests, sampling parameters, completions."""

import itertools
import operator
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from reprlib import repr  # long values are shortened
from typing import Any, Literal

from engine.errors import EngineError, RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]

BY_POSITION = -1
"""The id of a request that gets its position among the requests, from 0, as its id."""

# Abstract types come last, because they are slow to check.
_NUMBER, _INTEGER = (float, int, Real), (int, Integral)
_OPTIONAL = (int, type(None), Integral)
_PARAM_TYPES: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("temperature", _NUMBER, "a number"),
    ("top_k", _INTEGER, "an integer"),
    ("top_p", _NUMBER, "a number"),
    ("seed", _OPTIONAL, "an integer or None"),
    ("max_new_tokens", _OPTIONAL, "an integer or None"),
    ("max_positions", _OPTIONAL, "an integer or None"),
    ("stop_ids", (frozenset, Set), "a set of token ids"),
    ("ignore_eos", (bool,), "True or False"),
    ("logprobs", _OPTIONAL, "an integer or None"),
)


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are sampled and when it ends.

    A request ends at the first of: a stop id (kept in the output), `max_new_tokens`,
    `max_positions` (prompt included), the model's own limit. Raises TypeError for a value of the
    wrong type and EngineError for one that is out of range.
    """

    temperature: float = 0.0  # 0: greedy; top_k, top_p and seed have no effect then
    top_k: int = 0  # 0: keep every token
    top_p: float = 1.0  # nucleus: the smallest set of tokens with at least this probability
    # The same seed gives the same tokens, in any batch. None: each request has a random one.
    seed: int | None = None
    max_new_tokens: int | None = None
    max_positions: int | None = None
    stop_ids: frozenset[int] = frozenset()  # in addition to the checkpoint's own
    ignore_eos: bool = False  # ignore the checkpoint's own stop ids (`stop_ids` still count)
    # None: no log-probabilities; n: those of the sampled token and of the n most likely tokens
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raise an error that names the first parameter with a wrong type or value."""
        for name, types, wanted in _PARAM_TYPES:
            value = getattr(self, name)
            if not isinstance(value, types):
                raise TypeError(f"{name} must be {wanted}, not {repr(value)}")
        for token_id in self.stop_ids:
            if not isinstance(token_id, _INTEGER):
                raise TypeError(f"stop_ids must be a set of token ids, but has {repr(token_id)}")
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
    it, as the engine does not handle text. Raises TypeError for a prompt that is not a sequence of
    integers; arrays and tensors with one dimension are converted.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: int = BY_POSITION  # copied to the completion
    on_token: Callable[[int], bool | None] | None = None

    def __post_init__(self) -> None:
        """Convert the prompt, and raise TypeError for an argument of the wrong type."""
        if set(map(type, _sized(self.prompt_ids))) - {int}:
            object.__setattr__(self, "prompt_ids", _integers(self.prompt_ids))
        if not isinstance(self.params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, not {repr(self.params)}")
        if not isinstance(self.request_id, Integral):
            raise TypeError(f"request_id must be an integer, not {repr(self.request_id)}")
        if self.on_token is not None and not callable(self.on_token):
            raise TypeError(f"on_token must be a function of a token id, not {repr(self.on_token)}")


def _sized(prompt_ids: Any) -> Sequence[int]:
    """Return a prompt that may consist of token ids. Raises TypeError for any other."""
    if isinstance(prompt_ids, (str, bytes)):
        raise TypeError(
            "prompt_ids must be token ids, not text: encode it with Tokenizer.encode, or use "
            "getp.LLM, which takes text"
        )
    if not hasattr(prompt_ids, "__len__"):
        raise TypeError(f"prompt_ids must be a list of token ids, not {repr(prompt_ids)}")
    return prompt_ids


def _integers(values: Iterable[Any]) -> list[int]:
    """Return integers of any type, such as NumPy's, as Python's. Raises TypeError for others."""
    integers = []
    for value in values:
        try:
            integers.append(operator.index(value))
        except TypeError:
            raise TypeError(f"a token id must be an integer, not {repr(value)}") from None
    return integers


def numbered(requests: Iterable[Request | None]) -> Iterator[Request | None]:
    """Return an iterator that gives each request the id and the seed that it lacks.

    The id is its position, from 0; None, which stands for no request, is passed on and not counted.
    The seed is random. Raises TypeError, at the call or at its turn, for anything but requests.
    """
    if isinstance(requests, Request):
        raise TypeError("expected an iterable of requests, not one Request: use [request]")
    if isinstance(requests, (str, bytes)) or not hasattr(requests, "__iter__"):
        raise TypeError(
            f"expected an iterable of requests, not {repr(requests)}{_remedy(requests)}"
        )
    return _numbered(iter(requests))


def _numbered(requests: Iterator[Request | None]) -> Iterator[Request | None]:
    positions = itertools.count()
    for request in requests:
        if request is None:
            yield None
            continue
        position = next(positions)
        if not isinstance(request, Request):
            raise TypeError(
                f"expected a Request at position {position}, not {repr(request)}{_remedy(request)}"
            )
        changes: dict[str, Any] = {}
        if request.request_id == BY_POSITION:
            changes["request_id"] = position
        if request.params.seed is None and request.params.temperature > 0:
            changes["params"] = replace(request.params, seed=secrets.randbits(63))
        yield replace(request, **changes) if changes else request


def _remedy(given: object) -> str:
    if isinstance(given, str):
        return ": use Request(tokenizer.encode(text)), or getp.LLM, which takes text"
    return ": use Request(token_ids)"


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
