"""Input and output of the engine: requests and completions."""

import itertools
import operator
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from reprlib import repr  # long values are shortened
from typing import Any, Literal

from engine.errors import RequestError
from engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]

BY_POSITION = -1
"""The id of a request that gets its position among the requests, from 0, as its id."""


@dataclass(frozen=True)
class Request:
    """One prompt, as token ids, and how to continue it.

    `on_token` is called with each new token id as soon as it is known, stop tokens included. If it
    returns True, the request ends (finish reason "stop"). Streaming and stop strings are built on
    it, as the engine does not handle text. `on_logprobs` is called after it with the token's
    log-probabilities, if the request asks for them. Requests with a lower `priority` number run
    first, and others are preempted for them. Raises TypeError for a prompt that is not a sequence
    of integers; arrays and tensors with one dimension are converted.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: int = BY_POSITION  # copied to the completion
    on_token: Callable[[int], bool | None] | None = None
    priority: int = 0
    on_logprobs: Callable[["TokenLogprobs"], None] | None = None

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
    """Natural-log probabilities at one output position, of the logits that the model computed.

    Nothing that `SamplingParams` changes is part of them.
    """

    logprob: float  # of the sampled token; 0 for one that a thinking budget wrote
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
    # Of the prompt's tokens from `prompt_logprobs_from` to the last one.
    prompt_logprobs: list[TokenLogprobs] | None = None
    arrived: float = 0.0  # when the engine took the request
    first_token: float = 0.0  # when the first output token was known
    finished: float = 0.0
    stop_id: int | None = None  # the last of token_ids, if it ended the request
