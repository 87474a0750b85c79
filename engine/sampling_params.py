"""SamplingParams: how the tokens of one request are sampled and when it ends."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from reprlib import repr  # long values are shortened

from engine.errors import EngineError
from engine.grammar import Grammar

# Abstract types come last, because they are slow to check.
NUMBER, INTEGER = (float, int, Real), (int, Integral)
_OPTIONAL = (int, type(None), Integral)
_PARAM_TYPES: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("temperature", NUMBER, "a number"),
    ("top_k", INTEGER, "an integer"),
    ("top_p", NUMBER, "a number"),
    ("min_p", NUMBER, "a number"),
    ("seed", _OPTIONAL, "an integer or None"),
    ("presence_penalty", NUMBER, "a number"),
    ("frequency_penalty", NUMBER, "a number"),
    ("repetition_penalty", NUMBER, "a number"),
    ("max_new_tokens", _OPTIONAL, "an integer or None"),
    ("min_new_tokens", INTEGER, "an integer"),
    ("max_positions", _OPTIONAL, "an integer or None"),
    ("stop_ids", (frozenset, Set), "a set of token ids"),
    ("ignore_eos", (bool,), "True or False"),
    ("logprobs", _OPTIONAL, "an integer or None"),
    ("prompt_logprobs", _OPTIONAL, "an integer or None"),
    ("prompt_logprobs_from", INTEGER, "an integer"),
)
_RANGES = (
    ("temperature", 0, float("inf"), "0 or more"),
    ("top_k", 0, float("inf"), "0 (all tokens) or more"),
    ("min_p", 0, 1, "from 0 to 1"),
    ("presence_penalty", -2, 2, "from -2 to 2"),
    ("frequency_penalty", -2, 2, "from -2 to 2"),
    ("min_new_tokens", 0, float("inf"), "0 or more"),
    ("max_new_tokens", 0, float("inf"), "0 or more"),
    ("max_positions", 1, float("inf"), "1 or more"),
    ("logprobs", 0, 20, "from 0 to 20"),
    ("prompt_logprobs", 0, 20, "from 0 to 20"),
    ("prompt_logprobs_from", 1, float("inf"), "1 or more"),
)
_MAX_REPETITION_PENALTY = 100.0
_MAX_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
"""The most tokens of `logit_bias`, and the most entries of `bad_words`."""


@dataclass(frozen=True)
class ThinkingBudget:
    """The most tokens that a model may think before it must answer.

    Tokens are thought while the last of `start_ids` and `end_ids` (sequences of tokens) in the
    output is `start_ids`; with `is_open`, from the first token on. After `max_tokens` of them,
    `forced_ids` are written in place of what the model samples, and the answer follows.
    """

    max_tokens: int
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    forced_ids: tuple[int, ...]  # contain end_ids
    is_open: bool = False  # the prompt ends where thinking begins


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are sampled and when it ends.

    A request ends at the first of: a stop id (kept in the output), `max_new_tokens`,
    `max_positions` (prompt included), the model's own limit. Raises TypeError for a value of the
    wrong type and EngineError for one that is out of range.

    Logits are changed in this order, as in vLLM: `logit_bias`, `bad_words` and `min_new_tokens`;
    then the repetition, frequency and presence penalties; then the temperature, `min_p`, `top_k`
    and `top_p`. At temperature 0 the most likely token after the penalties is chosen.
    """

    temperature: float = 0.0  # 0: greedy; top_k, top_p, min_p and seed have no effect then
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
    min_p: float = 0.0  # keep tokens with at least this share of the highest probability
    # Subtracted from the logit of each token in the output: once, and for each occurrence.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # Divides the positive logits of tokens in the prompt or the output, multiplies the negative.
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0  # no stop id is sampled before
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()  # added to logits
    # Sequences of tokens that the output never contains.
    bad_words: tuple[tuple[int, ...], ...] = ()
    thinking: ThinkingBudget | None = None
    grammar: Grammar | None = None  # what the output must match
    # As logprobs, of the tokens of the prompt from this position on (at least from the second one).
    # KV of earlier positions may come from the prefix cache.
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1

    def __post_init__(self) -> None:
        """Raise an error that names the first parameter with a wrong type or value."""
        for name, types, wanted in _PARAM_TYPES:
            value = getattr(self, name)
            if not isinstance(value, types):
                raise TypeError(f"{name} must be {wanted}, not {repr(value)}")
        _check_ids("stop_ids", "a set of token ids", self.stop_ids)
        for name, least, most, allowed in _RANGES:
            value = getattr(self, name)
            if value is not None and not (least <= value <= most and value < float("inf")):
                raise _out_of_range(name, allowed, value)
        if not 0 < self.top_p <= 1:
            raise _out_of_range("top_p", "above 0 and at most 1", self.top_p)
        if not 0 < self.repetition_penalty <= _MAX_REPETITION_PENALTY:
            allowed = f"above 0 and at most {_MAX_REPETITION_PENALTY:g}"
            raise _out_of_range("repetition_penalty", allowed, self.repetition_penalty)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            allowed = "at most {max_new_tokens}"
            raise _out_of_range("min_new_tokens", allowed, self.min_new_tokens)
        self._read_bias()
        self._read_bad_words()
        if self.thinking is not None and not isinstance(self.thinking, ThinkingBudget):
            raise TypeError(f"thinking must be a ThinkingBudget or None, not {repr(self.thinking)}")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise TypeError(f"grammar must be a Grammar or None, not {repr(self.grammar)}")

    def _read_bias(self) -> None:
        """Bring `logit_bias` into one form, by token. Raises TypeError, EngineError."""
        given = self.logit_bias
        if given == ():
            return
        pairs = given.items() if isinstance(given, Mapping) else given
        try:
            pairs = tuple(sorted((token, float(bias)) for token, bias in pairs))
        except (TypeError, ValueError):
            raise TypeError(
                f"logit_bias must map token ids to numbers, not {repr(given)}"
            ) from None
        _check_ids("logit_bias", "a mapping from token ids", (token for token, _ in pairs))
        _check_count("logit_bias", len(pairs))
        for _, bias in pairs:
            if not -_MAX_BIAS <= bias <= _MAX_BIAS:
                raise _out_of_range("logit_bias", f"from -{_MAX_BIAS:g} to {_MAX_BIAS:g}", bias)
        object.__setattr__(self, "logit_bias", pairs)

    def _read_bad_words(self) -> None:
        """Bring `bad_words` into one form. Raises TypeError, EngineError."""
        if self.bad_words == ():
            return
        try:
            words = tuple(map(tuple, self.bad_words))
        except TypeError:
            raise TypeError(
                f"bad_words must be sequences of token ids, not {repr(self.bad_words)}"
            ) from None
        for word in words:
            _check_ids("bad_words", "sequences of token ids", word)
            if not word:
                raise EngineError("{bad_words} must not contain an empty sequence")
        _check_count("bad_words", len(words))
        object.__setattr__(self, "bad_words", words)

    @property
    def bias(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as pairs of token and bias."""
        return self.logit_bias if isinstance(self.logit_bias, tuple) else ()

    @cached_property
    def has_penalties(self) -> bool:
        """Whether a penalty depends on the tokens so far."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @cached_property
    def adjusts_logits(self) -> bool:
        """Whether logits are changed before temperature, top-k and top-p apply."""
        return bool(
            self.has_penalties
            or self.logit_bias
            or self.bad_words
            or self.min_new_tokens
            or self.grammar is not None
            or (self.min_p and self.temperature)
        )


def _check_ids(parameter: str, wanted: str, token_ids: Iterable[object]) -> None:
    for token_id in token_ids:
        if not isinstance(token_id, INTEGER):
            raise TypeError(f"{parameter} must be {wanted}, but has {repr(token_id)}")


def _check_count(parameter: str, count: int) -> None:
    if count > MAX_BIASED_TOKENS:
        raise EngineError(
            f"{{{parameter}}} must have at most {{allowed}} entries, not {{count}}",
            allowed=MAX_BIASED_TOKENS,
            count=count,
        )


def _out_of_range(parameter: str, allowed: str, value: float) -> EngineError:
    return EngineError(f"{{{parameter}}} must be {allowed}, not {{value}}", value=value)
