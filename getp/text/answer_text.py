"""Converts the tokens of an answer to text, during generation or afterwards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tokenizer import HarmonyParser, StopStrings, StreamDecoder, Tokenizer
from tokenizer.harmony import FINAL, ChannelText, supports_harmony


@dataclass
class ToolCall:
    """A message of the model to a tool."""

    recipient: str
    arguments: str = ""


@dataclass
class Answer:
    """The parts of a finished answer. Without channels all of it is `content`."""

    content: str = ""  # the text for the user
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


def read_answer(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    prompt_ids: Sequence[int],
    chat: bool,
    stops: Sequence[str] = (),
) -> Answer:
    """Return the parts of a finished answer, its content cut at the first stop string."""
    in_channels = chat and supports_harmony(tokenizer)
    if not stops and not in_channels:
        return Answer(tokenizer.decode(token_ids))  # much faster than token by token
    text = AnswerText(tokenizer, prompt_ids, chat, stops)
    pieces = []
    for token_id in token_ids:
        pieces.append(text.push(token_id))
        if text.stopped:
            break
    found = [piece for piece in [*pieces, *text.flush()] if piece is not None]
    if in_channels and not found and tokenizer.token_id("<|channel|>") not in token_ids:
        return Answer(tokenizer.decode(token_ids))  # no channels: return the whole text
    return _join(found)


def _join(pieces: Sequence[ChannelText]) -> Answer:
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, ToolCall] = {}
    for piece in pieces:
        if piece.recipient is not None:
            call = calls.setdefault(piece.message, ToolCall(piece.recipient))
            call.arguments += piece.text
        else:
            (content if piece.channel == FINAL else reasoning).append(piece.text)
    return Answer("".join(content), "".join(reasoning), list(calls.values()))


class StopWatcher:
    """An `on_token` callback that ends a request at a stop string.

    The token that completes the string is kept, like a stop token. `check` is called for every
    token and may raise. An error while decoding ends only this request and is stored in `error`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        chat: bool,
        stops: tuple[str, ...],
        check: Callable[[], None] | None = None,
    ) -> None:
        self.chat = chat
        self.stops = stops
        self.check = check
        self.error: str | None = None
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._answer: AnswerText | None = None

    def __call__(self, token_id: int) -> bool:
        """Return whether the request ends with this token."""
        if self.check is not None:
            self.check()
        if not self.stops:  # without stop strings there is no need to decode yet
            return False
        try:
            if self._answer is None:
                self._answer = AnswerText(self._tokenizer, self._prompt_ids, self.chat, self.stops)
            self._answer.push(token_id)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            return True
        return self._answer.stopped


class AnswerText:
    """Converts an answer's tokens to text by channel, up to the first stop string.

    `chat`: the prompt came from a chat template, so gpt-oss answers in channels. Any other answer
    is entirely in the channel `final`. Stop strings are detected only in `final`, not in the
    model's reasoning.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], chat: bool, stops: Sequence[str]
    ) -> None:
        harmony = chat and supports_harmony(tokenizer)
        self._parser = HarmonyParser(tokenizer, prompt_ids) if harmony else None
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(stops)
        self._final: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """The final text that `push` and `flush` have returned so far."""
        return "".join(self._final)

    def push(self, token_id: int) -> ChannelText | None:
        """Process the next token; return the text it adds, if any. Sets `stopped`."""
        if self._parser is not None:
            return self._apply_stop_strings(self._parser.push(token_id))
        return self._apply_stop_strings(ChannelText(FINAL, self._decoder.push(token_id)))

    def flush(self) -> list[ChannelText]:
        """Return the text held back for a stop string; call it after the last token."""
        if self.stopped:
            return []
        if self._parser is not None:
            last = self._apply_stop_strings(self._parser.flush())
        else:
            last = self._apply_stop_strings(ChannelText(FINAL, self._decoder.flush()))
        held = ChannelText(FINAL, "" if self.stopped else self._stops.flush())
        self._final.append(held.text)
        return [piece for piece in (last, held) if piece and piece.text]

    def _apply_stop_strings(self, piece: ChannelText | None) -> ChannelText | None:
        if piece is None or piece.channel != FINAL:
            return piece
        result = self._stops.push(piece.text)
        self.stopped = result.stopped
        self._final.append(result.text)
        return ChannelText(FINAL, result.text) if result.text else None
