"""Shortens prompts that leave no room for an answer, where a job asks for it."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from getp.errors import GetpError
from tokenizer import Message, Tokenizer

Side = Literal["none", "left", "right"]
"""Where a prompt is cut; none: not at all."""

_Cuttable = TypeVar("_Cuttable", str, list[int])

_MIN_CHECKED_LENGTH = 1 << 20  # characters; shorter texts are encoded as they are
_MAX_ROUNDS = 64  # cuts of messages; each but the last few leaves a message out


class Truncation:
    """Cuts prompts on one side so that they fit into `limit` tokens together with an answer.

    A prompt with fewer than `limit` tokens stays whole. Of a longer one, `new_tokens` are left for
    the answer, or half of the limit if that is less.
    """

    def __init__(self, side: Side, tokenizer: Tokenizer, limit: int, new_tokens: int | None):
        self._side, self._tokenizer, self._limit = side, tokenizer, limit
        half = limit // 2
        self._kept = max(1, limit - min(half, half if new_tokens is None else new_tokens))
        # A longer text has too many tokens, and need not be encoded as a whole.
        self._max_text = max(_MIN_CHECKED_LENGTH, limit * tokenizer.max_token_bytes)

    def text(self, text: str) -> tuple[list[int], bool]:
        """Return the tokens of a text that is not a conversation, and whether it was cut.

        Raises TokenizerError.
        """
        shown = self._cut(text, self._max_text)
        ids, is_cut = self.ids(self._tokenizer.encode(shown))
        return ids, is_cut or len(shown) < len(text)

    def ids(self, ids: list[int]) -> tuple[list[int], bool]:
        """Return a prompt of token ids, and whether it was cut. A special token at its start stays.

        Such a token is the one with which every text of the model begins.
        """
        if len(ids) < self._limit:
            return ids, False
        first = ids[:1] if ids[0] in self._tokenizer.special_ids else []
        return first + self._cut(ids[len(first) :], max(1, self._kept - len(first))), True

    def conversation(
        self, messages: Sequence[Message], render: Callable[[Sequence[Message]], str]
    ) -> tuple[list[int], bool]:
        """Return the tokens of a conversation whose longest messages were cut, and whether any was.

        What the chat template writes stays whole. Raises GetpError if cutting messages does not
        help, and what `render` raises.
        """
        turns, is_cut = [dict(message) for message in messages], False
        for _ in range(_MAX_ROUNDS):
            text = render(turns)
            if len(text) > self._max_text:
                excess, by_token = len(text) - self._max_text, False
            else:
                ids = self._tokenizer.encode(text, special=False)
                if len(ids) < self._limit and (not is_cut or len(ids) <= self._kept):
                    return ids, is_cut
                excess, by_token = len(ids) - self._kept, True
            longest = max(turns, key=lambda turn: len(turn.get("content") or ""))
            if not longest.get("content"):
                break
            longest["content"] = self._shorter(longest["content"], excess, by_token)
            is_cut = True
        raise GetpError(
            "the prompt is too long for the limit of {limit} tokens, even with its messages cut",
            limit=self._limit,
        )

    def _shorter(self, text: str, excess: int, by_token: bool) -> str:
        """Return a text without `excess` of its tokens or characters; some text is left out."""
        if not by_token:
            return self._cut(text, max(0, len(text) - excess))
        ids = self._tokenizer.encode(text, special=False)
        kept = self._cut(ids, max(0, len(ids) - excess))
        shorter = self._tokenizer.decode(kept, skip_special=False).strip("\ufffd")
        return shorter if len(shorter) < len(text) else self._cut(text, len(text) // 2)

    def _cut(self, whole: _Cuttable, length: int) -> _Cuttable:
        start = max(0, len(whole) - length) if self._side == "left" else 0
        return whole[start : start + length]
