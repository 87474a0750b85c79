"""The harmony format of gpt-oss: an answer consists of messages, each in a channel.

    <|channel|>analysis<|message|>Let me see…<|end|>
    <|start|>assistant<|channel|>final<|message|>It is 4.<|return|>

`analysis` holds reasoning, `commentary` holds tool calls, `final` holds the answer. `<|end|>` ends
a message, not the whole answer. Specification:
https://cookbook.openai.com/articles/openai-harmony.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizer.stream import StreamDecoder
from tokenizer.tokenizer import Tokenizer

FINAL = "final"
_MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


class ChannelText(NamedTuple):
    """A piece of a message's text and its channel. A message without a channel is in `final`."""

    channel: str
    text: str


def supports_harmony(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has the harmony markers as special tokens."""
    return all(tokenizer.token_id(marker) in tokenizer.special_ids for marker in _MARKERS)


class HarmonyParser:
    """Parses an answer token by token and returns the text that each token adds to a channel.

    `prompt_ids` is the prompt that the answer continues. It usually ends with
    `<|start|>assistant`, but it may already name a channel or begin a message.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._start, self._channel_mark, self._message, self._end, self._return = (
            tokenizer.token_id(marker) for marker in _MARKERS
        )
        self._call = tokenizer.token_id("<|call|>")  # ends a message to a tool
        self._channel_ids: list[int] | None = None  # header tokens after <|channel|>
        self._channel = FINAL
        self._body: StreamDecoder | None = None  # None outside a message's text
        for token_id in _last_message(prompt_ids, self._start):
            self.push(token_id)

    def push(self, token_id: int) -> ChannelText | None:
        """Process the next token; return the text it adds, if any."""
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
        """Return the text held back because its last character is incomplete; call at the end."""
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
    """Return the answer of a completed request: the `final` channel, or all text without harmony.

    A completion is in the harmony format if the tokenizer supports it and a message begins in the
    completion or is open at the end of `prompt_ids`.
    """
    message = tokenizer.token_id("<|message|>")
    open_message = message in _last_message(prompt_ids, tokenizer.token_id("<|start|>"))
    if not supports_harmony(tokenizer) or not (open_message or message in token_ids):
        return tokenizer.decode(token_ids)
    parser = HarmonyParser(tokenizer, prompt_ids)
    pieces = [parser.push(token_id) for token_id in token_ids]
    pieces.append(parser.flush())
    return "".join(piece.text for piece in pieces if piece and piece.channel == FINAL)


def _last_message(ids: Sequence[int], start: int | None) -> list[int]:
    """Return the tokens from the last `<|start|>` to the end, or [] if there is none."""
    for at in range(len(ids) - 1, -1, -1):
        if ids[at] == start:
            return list(ids[at:])
    return []
