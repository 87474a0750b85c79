"""Converts the tokens of an answer to text, during generation or afterwards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tokenizer import HarmonyParser, StopStrings, StreamDecoder, Tokenizer
from tokenizer.harmony import FINAL, ChannelText, supports_harmony


@dataclass(frozen=True)
class AnswerOptions:
    """How tokens become the text of an answer."""

    chat: bool = False  # the prompt came from the chat template
    stops: tuple[str, ...] = ()  # texts that end the answer
    include_stop: bool = False  # keep the text or the token that ended the answer
    skip_special: bool = True  # leave special tokens out
    min_tokens: int = 0  # tokens in which no stop string counts


PLAIN = AnswerOptions()
"""The whole text of an answer, without special tokens."""


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
    options: AnswerOptions,
    stop_id: int | None = None,
) -> Answer:
    """Return the parts of a finished answer, its content cut at the first stop string.

    stop_id: the last token, if it ended the request; it is part of the text only on request.
    """
    if stop_id is not None and not options.include_stop:
        token_ids = token_ids[:-1]
    in_channels = options.chat and supports_harmony(tokenizer)
    if not options.stops and not in_channels:
        # Much faster than token by token.
        return Answer(tokenizer.decode(token_ids, skip_special=options.skip_special))
    text = AnswerText(tokenizer, prompt_ids, options)
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
        options: AnswerOptions,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.options = options
        self.check = check
        self.error: str | None = None
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._answer: AnswerText | None = None

    def __call__(self, token_id: int) -> bool:
        """Return whether the request ends with this token."""
        if self.check is not None:
            self.check()
        if not self.options.stops:  # without stop strings there is no need to decode yet
            return False
        try:
            if self._answer is None:
                self._answer = AnswerText(self._tokenizer, self._prompt_ids, self.options)
            self._answer.push(token_id)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            return True
        return self._answer.stopped


class AnswerText:
    """Converts an answer's tokens to text by channel, up to the first stop string.

    If the prompt came from a chat template, gpt-oss answers in channels. Any other answer is
    entirely in the channel `final`. Stop strings are detected only in `final`, not in the model's
    reasoning.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], options: AnswerOptions
    ) -> None:
        harmony = options.chat and supports_harmony(tokenizer)
        self._parser = HarmonyParser(tokenizer, prompt_ids) if harmony else None
        self._decoder = StreamDecoder(tokenizer, options.skip_special)
        self._stops = StopStrings(options.stops, options.include_stop)
        self._unchecked = options.min_tokens  # tokens in which no stop string counts
        self._final: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """The final text that `push` and `flush` have returned so far."""
        return "".join(self._final)

    def push(self, token_id: int) -> ChannelText | None:
        """Process the next token; return the text it adds, if any. Sets `stopped`."""
        self._unchecked -= 1
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
        if self._unchecked >= 0:
            self._final.append(piece.text)
            return piece
        result = self._stops.push(piece.text)
        self.stopped = result.stopped
        self._final.append(result.text)
        return ChannelText(FINAL, result.text) if result.text else None
