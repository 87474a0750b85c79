"""Which tokens the grammars of requests allow next: bit masks, computed while the device runs.

Grammars are compiled, and masks are computed, by llguidance in threads that do not hold Python's
lock. A mask depends on the sequence's last token. Where the next step is launched before that token
is known, its model runs first; then the token is read and the mask computed, and then the step
samples: a GPU computes in the meantime (`StepLoop`).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import GrammarError, RequestError
from engine.grammar import Grammar

if TYPE_CHECKING:
    import llguidance

_CACHED = 256  # compiled grammars that are kept
# Between the parts of JSON: a space, or a new line and its indentation. Without a limit a model may
# write whitespace forever.
_WHITESPACE = r" |\n[ \t]{0,24}"
_ALL = -1  # a word of a mask that allows 32 tokens


class Matcher:
    """The place of one sequence in its grammar."""

    def __init__(
        self,
        compiled: "Future[llguidance.LLMatcher]",
        grammar: Grammar,
        stop_ids: frozenset[int],
    ):
        self._compiled, self._kind, self.stop_ids = compiled, grammar.kind, stop_ids
        self._after = [*grammar.after_ids]
        self._last: list[int] = []  # the newest tokens, until those of `after_ids` have occurred
        self.opening_id = grammar.opening_id  # allowed as the first token; None after that

    @property
    def is_waiting(self) -> bool:
        """Whether the part of the output that must match has not begun."""
        return bool(self._after) and self.opening_id is None

    @property
    def is_compiled(self) -> bool:
        """Whether the grammar is compiled, or known to be one that cannot be used."""
        return self._compiled.done()

    def wait(self, seconds: float) -> None:
        """Wait until the grammar is compiled, but not for longer."""
        wait([self._compiled], seconds)

    @cached_property
    def error(self) -> RequestError | None:
        """Why the grammar cannot be used; None if it can. Waits until it is compiled."""
        error = self._compiled.exception()
        if error is None or isinstance(error, RequestError):
            return error
        raise error

    @cached_property
    def state(self) -> "llguidance.LLMatcher":
        """The library's state. Raises RequestError."""
        return self._compiled.result().deep_copy()

    def append(self, token: int, was_forced: bool = False) -> bool:
        """Follow the next token of the output; returns whether the match is complete with it.

        was_forced: it ends the thinking, and is not part of what must match.
        Call `check` before. Raises RequestError if the grammar is too complex to go on.
        """
        if self.opening_id is not None:
            if token != self.opening_id:
                self._after = []
            self.opening_id = None
        if self._after:
            self._last = [*self._last, token][-len(self._after[0]) :]
            if tuple(self._last) == self._after[0]:
                self._last = []
                del self._after[0]
            return False
        if was_forced:
            return False
        self.state.consume_token(token)
        self.check()
        return bool(self.state.is_stopped())

    def check(self) -> None:
        """Raise RequestError if the grammar cannot be used, or cannot go on.

        The library allows the tokens that end the output where nothing else is possible.
        """
        if self.error is not None:
            raise self.error
        if not self.is_waiting and self.state.is_error():
            raise _error(self._kind, self.state.get_error())


class Matchers:
    """Compiles grammars for one tokenizer and computes masks. Threads start at the first use."""

    def __init__(self, tokenizer_json: Callable[[], str], vocab: int, stop_ids: frozenset[int]):
        """tokenizer_json: returns the content of the tokenizer's tokenizer.json."""
        self._tokenizer_json, self._stop_ids = tokenizer_json, stop_ids
        self.words = -(-vocab // 32)
        self._vocab = vocab
        self._compiled: OrderedDict[tuple[str, str], Future[Any]] = OrderedDict()

    @cached_property
    def _library(self) -> Any:
        try:
            import llguidance
        except ModuleNotFoundError:
            raise RequestError(
                "the {grammar} needs the package llguidance: pip install 'getp[structured]'"
            ) from None
        return llguidance

    @cached_property
    def _tokenizer(self) -> "llguidance.LLTokenizer":
        text, ends = self._tokenizer_json(), sorted(self._stop_ids) or None
        try:
            with suppress(ValueError):
                return self._library.LLTokenizer(text, n_vocab=self._vocab, eos_token=ends)
            # It has more tokens than the model.
            return self._library.LLTokenizer(text, eos_token=ends)
        except ValueError as error:
            raise RequestError(
                "the {grammar} cannot be used with this tokenizer: {reason}", reason=error
            ) from error

    @cached_property
    def _executor(self) -> "llguidance.LLExecutor":
        return self._library.LLExecutor()

    @cached_property
    def _compiling(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "getp-grammars")

    @cached_property
    def _computing(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "getp-masks")

    def start(self, grammar: Grammar, stop_ids: frozenset[int]) -> Matcher:
        """The matcher of a new sequence; its grammar is compiled in another thread."""
        key = grammar.kind, grammar.text
        compiled = self._compiled.pop(key, None)
        if compiled is None:
            compiled = self._compiling.submit(self._compile, *key)
        self._compiled[key] = compiled
        if len(self._compiled) > _CACHED:
            self._compiled.popitem(last=False)
        return Matcher(compiled, grammar, stop_ids)

    def _compile(self, kind: str, text: str) -> "llguidance.LLMatcher":
        library, tokenizer = self._library, self._tokenizer
        try:
            if kind == "json_schema":
                options = {"whitespace_pattern": _WHITESPACE}
                grammar = library.LLMatcher.grammar_from_json_schema(text, options)
            else:
                grammar = library.grammar_from("grammar" if kind == "lark" else kind, text)
        except ValueError as error:
            raise _error(kind, str(error)) from error
        matcher = library.LLMatcher(tokenizer, grammar, log_level=0)
        matcher.compute_bitmask()  # for some grammars it takes seconds, or fails
        if matcher.is_error():
            raise _error(kind, matcher.get_error())
        return matcher

    def masks(self, matchers: Sequence[Matcher]) -> torch.Tensor:
        """Bits of the allowed tokens, int32 [matchers, words], on the host.

        A matcher with an error allows every token.
        """
        ready = [
            (matcher.state, i)
            for i, matcher in enumerate(matchers)
            if not matcher.is_waiting and matcher.error is None
        ]
        words = self.words
        if ready:
            words = max(words, -(-self._tokenizer.vocab_size // 32))
        found = torch.full((len(matchers), words), _ALL, dtype=torch.int32)
        if ready:
            self._executor.unsafe_compute_mask_ptr(ready, found.data_ptr(), 4 * words, len(found))
        for i, matcher in enumerate(matchers):
            allowed = found[i].view(torch.uint8)
            for token in matcher.stop_ids if matcher.is_waiting else ():
                if 0 <= token < self._vocab:
                    allowed[token // 8] &= 255 ^ 1 << token % 8
            if matcher.opening_id is not None and matcher.error is None:
                allowed[matcher.opening_id // 8] |= 1 << matcher.opening_id % 8
        return found[:, : self.words]

    def begin(self, matchers: Sequence[Matcher]) -> Callable[[], torch.Tensor]:
        """Start to compute `masks` in a thread; the result waits for them."""
        return self._computing.submit(self.masks, matchers).result

    def close(self) -> None:
        """End the threads; grammars are compiled again when they are needed again."""
        self._compiled.clear()
        for name in ("_compiling", "_computing"):
            if name in self.__dict__:
                self.__dict__.pop(name).shutdown(wait=False, cancel_futures=True)


def _error(kind: str, reason: str) -> GrammarError:
    """The error of a grammar that the library does not accept."""
    # What follows is for developers of the library.
    reason = reason.partition("<state>")[0].partition("<backtrace>")[0]
    if reason.startswith("NoExtensionBias"):
        reason = "no text can match it, or complete what was written"
    # Without the lines that only point at a column of the line above.
    lines = [line.strip() for line in reason.splitlines() if line.strip("|^ ")]
    names = {"json_schema": "JSON schema", "regex": "regular expression"}
    name = names.get(kind, "grammar")
    return GrammarError("the {name} cannot be used: {reason}", name=name, reason=" ".join(lines))
