"""Incremental decoding: text from tokens that arrive one at a time, and stop strings."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # the decoder's output for bytes that are not, or not yet, valid UTF-8

# A character has at most four bytes and a token at least one, so more held tokens than this are
# not an incomplete character but invalid bytes.
_MAX_HELD = 8


class StreamDecoder:
    """Decodes tokens as they arrive and never returns part of a character.

    Tokens are decoded in a short window because a token's text depends on its neighbours: the
    bytes of one character can be spread over several tokens, and SentencePiece tokenizers drop the
    space before the first word. The window holds the most recently emitted tokens, as context, and
    the held tokens, which are not emitted yet; the new text is what the held tokens add. The window
    is short, so the cost of a token does not grow with the length of the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special: bool = True, kept: Set[int] = frozenset()
    ) -> None:
        """kept: special tokens that are part of the text nevertheless."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - kept if skip_special else frozenset()
        self._context: list[int] = []  # tokens emitted last
        self._context_text = ""
        self._held: list[int] = []  # tokens not yet emitted

    def push(self, token_id: int) -> str:
        """Add the next token; return the text that is now complete, possibly empty."""
        if token_id in self._skipped:
            return ""
        self._held.append(token_id)
        text = self._decode(self._context + self._held)
        added = text[len(self._context_text) :]
        if added and not added.endswith(_REPLACEMENT):
            return self._emit(added, len(self._held))
        if len(self._held) > _MAX_HELD:
            count = self._complete_tokens(text)
            complete = self._decode(self._context + self._held[:count])
            return self._emit(complete[len(self._context_text) :], count)
        return ""

    def flush(self) -> str:
        """Return the text of the held tokens; call it after the last token."""
        text = self._decode(self._context + self._held)[len(self._context_text) :]
        return self._emit(text, len(self._held))

    def _emit(self, text: str, count: int) -> str:
        """Return `text` after the first `count` held tokens have become the new context."""
        self._context, self._held = self._held[:count], self._held[count:]
        self._context_text = self._decode(self._context)
        return text

    def _complete_tokens(self, text: str) -> int:
        """Return how many held tokens can be emitted without splitting a character.

        Only the last three can belong to an incomplete character. A split is safe if both sides,
        decoded separately, give the same text as decoded together.
        """
        for count in range(len(self._held) - 1, len(self._held) - 4, -1):
            head = self._decode(self._context + self._held[:count])
            if head + self._decode(self._held[count:]) == text:
                return count
        return len(self._held)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)


@dataclass(frozen=True)
class StopResult:
    """Result of `StopStrings.push`: text that can be shown, and whether a stop string was found."""

    text: str
    stopped: bool


class StopStrings:
    """Finds the stop string that is completed first in a stream of text.

    The text ends before that string, or after it with `include`. A suffix that may begin a stop
    string is held back, so text that has been returned is never withdrawn. The result does not
    depend on how the text is split into pieces.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops, self._include = tuple(stops), include
        self._held = ""

    def push(self, piece: str) -> StopResult:
        """Add the next piece of text."""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            end, at = min(found)
            return StopResult(text[: end if self._include else at], stopped=True)
        keep = self._partial_match_length(text)
        self._held = text[len(text) - keep :]
        return StopResult(text[: len(text) - keep], stopped=False)

    def flush(self) -> str:
        """Return the text held back; call it at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _partial_match_length(self, text: str) -> int:
        """Return the length of the longest suffix of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
