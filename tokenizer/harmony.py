"""The harmony format of gpt-oss: an answer is several messages, each in a channel.

    <|channel|>analysis<|message|>Let me see…<|end|>
    <|start|>assistant<|channel|>final<|message|>It is 4.<|return|>

`analysis` is thinking, `commentary` is talk with tools, `final` is the answer. `<|end|>` ends a
message, not the answer. The format: https://cookbook.openai.com/articles/openai-harmony.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizer.stream import StreamDecoder
from tokenizer.tokenizer import Tokenizer

FINAL = "final"
_MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


class ChannelText(NamedTuple):
    """A piece of a message's text. A message without a channel is in `final`."""

    channel: str
    text: str


def speaks_harmony(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has harmony's markers as special tokens."""
    return all(tokenizer.token_id(marker) in tokenizer.special_ids for marker in _MARKERS)


class HarmonyParser:
    """Takes an answer's tokens one at a time and says what text they add to which channel.

    `prompt_ids` is the prompt the answer continues: it usually ends after
    `<|start|>assistant`, but may already name a channel or open a message.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._start, self._channel_mark, self._message, self._end, self._return = (
            tokenizer.token_id(marker) for marker in _MARKERS
        )
        self._call = tokenizer.token_id("<|call|>")  # ends a message to a tool
        self._channel_ids: list[int] | None = None  # the header's words after <|channel|>
        self._channel = FINAL
        self._body: StreamDecoder | None = None  # set while inside a message's text
        for token_id in _last_message(prompt_ids, self._start):
            self.push(token_id)

    def push(self, token_id: int) -> ChannelText | None:
        """Take the next token; return the text it adds, if any."""
        if token_id == self._message:
            self._channel = self._channel_name()
            self._body = StreamDecoder(self._tokenizer)
        elif token_id in (self._start, self._end, self._return, self._call):
            piece = self.flush()
            self._body = self._channel_ids = None
            return piece
        elif self._body is not None:
            return self._piece(self._body.push(token_id))
        elif token_id == self._channel_mark:
            self._channel_ids = []
        elif self._channel_ids is not None:
            self._channel_ids.append(token_id)
        return None

    def flush(self) -> ChannelText | None:
        """Return text still held back (half a character), at the end of the tokens."""
        return self._piece(self._body.flush()) if self._body is not None else None

    def _piece(self, text: str) -> ChannelText | None:
        return ChannelText(self._channel, text) if text else None

    def _channel_name(self) -> str:
        """Return the first word after `<|channel|>`; a recipient and a content type may follow."""
        words = self._tokenizer.decode(self._channel_ids or []).split()
        return words[0] if words else FINAL


def answer_text(
    tokenizer: Tokenizer, token_ids: Sequence[int], prompt_ids: Sequence[int] = ()
) -> str:
    """Return the answer in a finished completion: its final channel, or all of a plain one.

    A completion is in harmony's format if the tokenizer knows it and a message begins in the
    completion or is open at the end of `prompt_ids`.
    """
    message = tokenizer.token_id("<|message|>")
    open_message = message in _last_message(prompt_ids, tokenizer.token_id("<|start|>"))
    if not speaks_harmony(tokenizer) or not (open_message or message in token_ids):
        return tokenizer.decode(token_ids)
    parser = HarmonyParser(tokenizer, prompt_ids)
    pieces = [parser.push(token_id) for token_id in token_ids]
    pieces.append(parser.flush())
    return "".join(piece.text for piece in pieces if piece and piece.channel == FINAL)


def _last_message(ids: Sequence[int], start: int | None) -> list[int]:
    """Return the tokens from the last `<|start|>` on, none if there is none."""
    for at in range(len(ids) - 1, -1, -1):
        if ids[at] == start:
            return list(ids[at:])
    return []
