"""Text from tokens that come one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are not (yet) UTF-8

# A character has at most four bytes and a token at least one: tokens that are still unreadable
# after this many are no unfinished character.
_MOST_HELD = 8


class StreamDecoder:
    """Turns token ids into text as they come, never giving out half a character.

    Tokens are decoded in a short window, since what a token says depends on its neighbours:
    bytes of one character lie in several tokens, and SentencePiece tokenizers drop the space
    before the first word. The window is the last tokens given out and those not yet given out;
    the text is what the latter add. The window is short, so each token costs the same.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._given: list[int] = []  # tokens whose text is out: context for the next
        self._given_text = ""
        self._held: list[int] = []  # tokens whose text is not out

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is now certain (often one word, or "")."""
        if token_id in self._skipped:
            return ""
        self._held.append(token_id)
        text = self._decode(self._given + self._held)
        added = text[len(self._given_text) :]
        if added and not added.endswith(_REPLACEMENT):
            return self._give(added, len(self._held))
        if len(self._held) > _MOST_HELD:
            count = self._certain(text)
            certain = self._decode(self._given + self._held[:count])
            return self._give(certain[len(self._given_text) :], count)
        return ""

    def flush(self) -> str:
        """Return what was held back, at the end of the tokens."""
        text = self._decode(self._given + self._held)[len(self._given_text) :]
        return self._give(text, len(self._held))

    def _give(self, text: str, count: int) -> str:
        self._given, self._held = self._held[:count], self._held[count:]
        self._given_text = self._decode(self._given)
        return text

    def _certain(self, text: str) -> int:
        """Return how many held tokens can go out without cutting a character in two.

        Only the last three can belong to an unfinished character; a cut between two others is
        safe where the two sides decode to the same text apart as together.
        """
        for count in range(len(self._held) - 1, len(self._held) - 4, -1):
            head = self._decode(self._given + self._held[:count])
            if head + self._decode(self._held[count:]) == text:
                return count
        return len(self._held)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)


@dataclass(frozen=True)
class StopResult:
    """What `StopStrings.push` says: text that may be shown, and whether a stop string ended it."""

    text: str
    stopped: bool


class StopStrings:
    """Watches a stream of text for the first stop string to be completed.

    The answer is cut before that string. A tail that may be the beginning of one is held back,
    so nothing is ever shown that a later token takes back. How the text is cut into pieces
    makes no difference.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> StopResult:
        """Take the next piece of text."""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return StopResult(text[: min(found)[1]], stopped=True)
        keep = self._may_begin(text)
        self._held = text[len(text) - keep :]
        return StopResult(text[: len(text) - keep], stopped=False)

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
