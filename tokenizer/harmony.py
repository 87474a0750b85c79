"""The harmony format of gpt-oss: an answer consists of messages, each in a channel.

    <|channel|>analysis<|message|>Let me see…<|end|>
    <|start|>assistant<|channel|>final<|message|>It is 4.<|return|>

`analysis` holds reasoning and `final` the answer. A message with a recipient (`to=functions.name`
in its header, usually in the channel `commentary`) calls a tool; `commentary` without one is a
preamble, which is shown to the user like the answer. `<|end|>` ends a message, not the whole
answer. Specification: https://cookbook.openai.com/articles/openai-harmony.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizer.stream import StreamDecoder
from tokenizer.tokenizer import Tokenizer

FINAL = "final"
_MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


class ChannelText(NamedTuple):
    """A piece of a message's text.

    All text for the user is in the channel `final`: that of messages without a channel, too. A call
    of a tool has a piece without text at its start.
    """

    channel: str
    text: str
    recipient: str | None = None  # the tool that the message calls
    message: int = 0  # number of the message in the answer
    call_id: str = ""  # of a call, if the model writes one; not in this format


def supports_harmony(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has the harmony markers as special tokens."""
    return all(tokenizer.token_id(marker) in tokenizer.special_ids for marker in _MARKERS)


class HarmonyParser:
    """Parses an answer token by token and returns the text that each token adds to a channel.

    `prompt_ids` is the prompt that the answer continues. It usually ends with
    `<|start|>assistant`, but it may already name a channel or begin a message. Messages of the same
    channel are separated by a newline.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._start, self._channel_mark, self._message, self._end, self._return = (
            tokenizer.token_id(marker) for marker in _MARKERS
        )
        self._call = tokenizer.token_id("<|call|>")  # ends a message to a tool
        self._role_ids: list[int] = []  # header tokens before <|channel|>
        self._channel_ids: list[int] | None = None  # header tokens after <|channel|>
        self._body: StreamDecoder | None = None  # None outside a message's text
        self._channel = FINAL
        self._recipient: str | None = None
        self._number = -1  # of the message
        self._separator = ""  # text before the next piece of this message
        self._with_text: set[str] = set()  # channels in which the answer has text
        for token_id in _last_message(prompt_ids, self._start):
            self.push(token_id)

    def push(self, token_id: int) -> ChannelText | None:
        """Process the next token; return the text it adds, if any."""
        if token_id == self._message:
            return self._begin_body()
        if token_id in (self._start, self._end, self._return, self._call):
            piece = self.flush()
            self._body = self._channel_ids = None
            self._role_ids = []
            return piece
        if self._body is not None:
            return self._piece(self._body.push(token_id))
        if token_id == self._channel_mark:
            self._channel_ids = []
        else:
            header = self._role_ids if self._channel_ids is None else self._channel_ids
            header.append(token_id)
        return None

    def flush(self) -> ChannelText | None:
        """Return the text held back because its last character is incomplete; call at the end."""
        return self._piece(self._body.flush()) if self._body is not None else None

    def _begin_body(self) -> ChannelText | None:
        self._body = StreamDecoder(self._tokenizer)
        self._number += 1
        self._channel, self._recipient = self._parse_header()
        if self._recipient is not None:
            self._separator = ""
            return ChannelText(self._channel, "", self._recipient, self._number)
        self._separator = "\n" if self._channel in self._with_text else ""
        return None

    def _piece(self, text: str) -> ChannelText | None:
        if not text:
            return None
        text, self._separator = self._separator + text, ""
        if self._recipient is None:
            self._with_text.add(self._channel)
        return ChannelText(self._channel, text, self._recipient, self._number)

    def _parse_header(self) -> tuple[str, str | None]:
        """Return the channel and the recipient; both the role and the channel may name the latter.

        A content type may follow, with or without a space: `to=functions.add<|constrain|>json`.
        """
        role, channel = map(self._words, (self._role_ids, self._channel_ids or []))
        named = channel[0] if channel and not channel[0].startswith(("to=", "<|")) else None
        tools = [word[3:] for word in channel + role if word.startswith("to=") and word[3:]]
        if named == FINAL or not tools:
            return FINAL if named in (None, "commentary") else named, None
        # A result that the model writes in a tool's place is neither a call nor for the user.
        return named or "commentary", None if tools[0] == "assistant" else tools[0]

    def _words(self, ids: Sequence[int]) -> list[str]:
        return self._tokenizer.decode(ids, skip_special=False).replace("<|", " <|").split()


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
