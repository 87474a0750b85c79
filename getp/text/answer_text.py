"""Converts the tokens of an answer to text, during generation or afterwards."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from getp.text.parts.text_parts import TextParts
from getp.text.parts.tool_bodies import Schemas, ToolCall
from getp.text.parts.tool_calls import FORCED, ToolCallParser
from tokenizer import HarmonyParser, StopStrings, Tokenizer
from tokenizer.harmony import FINAL, ChannelText, supports_harmony


@dataclass(frozen=True)
class AnswerOptions:
    """How tokens become the text of an answer."""

    chat: bool = False  # the prompt came from the chat template
    stops: tuple[str, ...] = ()  # texts that end the answer
    include_stop: bool = False  # keep the text or the token that ended the answer
    skip_special: bool = True  # leave special tokens out
    min_tokens: int = 0  # tokens in which no stop string counts
    tools: Schemas | None = None  # whose calls are separated from the text; None: they are text
    one_call: bool = False  # the answer ends after its first call
    forced_calls: bool = False  # its grammar makes the answer a list of calls
    echo: bool = False  # the answer begins with its prompt
    with_prompt_logprobs: bool = False  # the log-probabilities of the prompt are part of it


PLAIN = AnswerOptions()
"""The whole text of an answer, without special tokens."""


@dataclass
class Answer:
    """The parts of a finished answer. Without channels and markers all of it is `content`."""

    content: str = ""  # the text for the user
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    echoed: str = ""  # the prompt, if the answer begins with it
    echoed_ids: Sequence[int] = ()
    scored_ids: Sequence[int] = ()  # the prompt, if its log-probabilities are part of the answer

    @property
    def with_calls(self) -> str:
        """The content, then each call on a line of its own, as JSON."""
        calls = [
            f'{{"name": {json.dumps(call.recipient)}, "arguments": {call.arguments or "{}"}}}'
            for call in self.tool_calls
        ]
        return "\n".join([self.content, *calls] if self.content else calls)


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
    answer = _read_output(tokenizer, token_ids, prompt_ids, options, stop_id)
    if options.echo:
        answer.echoed_ids = prompt_ids
        answer.echoed = prompt = tokenizer.decode(prompt_ids, skip_special=options.skip_special)
        # A decoder may leave out the space at the start of a text.
        whole = tokenizer.decode([*prompt_ids, *token_ids], skip_special=options.skip_special)
        if whole[len(prompt) :].startswith(" ") and not answer.content.startswith(" "):
            answer.echoed += " "
    if options.with_prompt_logprobs:
        answer.scored_ids = prompt_ids
    return answer


def _read_output(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    prompt_ids: Sequence[int],
    options: AnswerOptions,
    stop_id: int | None,
) -> Answer:
    if stop_id is not None and not options.include_stop:
        token_ids = token_ids[:-1]
    text = AnswerText(tokenizer, prompt_ids, options)
    pieces = []
    if options.stops or text.in_channels:
        for token_id in token_ids:
            pieces += text.push(token_id)
            if text.stopped:
                break
    else:
        pieces += text.push_all(token_ids)
    pieces += text.flush()
    if text.in_channels and not pieces and tokenizer.token_id("<|channel|>") not in token_ids:
        return Answer(tokenizer.decode(token_ids))  # no channels: return the whole text
    return _join(pieces)


def _join(pieces: Sequence[ChannelText]) -> Answer:
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, ToolCall] = {}
    for piece in pieces:
        if piece.recipient is not None:
            call = ToolCall(piece.recipient, id=piece.call_id)
            calls.setdefault(piece.message, call).arguments += piece.text
        else:
            (content if piece.channel == FINAL else reasoning).append(piece.text)
    return Answer("".join(content), "".join(reasoning), list(calls.values()))


class StopWatcher:
    """An `on_token` callback that ends a request at a stop string.

    The token that completes the string is kept, like a stop token. `check` is called for every
    token and may raise. An error while decoding ends only this request and is stored in `error`.
    """

    streams = False
    """Whether each token is wanted as soon as it is known, also from a replica."""

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
        if not self.options.stops and not self.options.one_call:
            return False  # there is no need to decode yet
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

    If the prompt came from a chat template, gpt-oss answers in channels, and other models may mark
    their thinking and calls of tools (`TextParts`). All text for the user is in the channel
    `final`; a piece with a recipient is part of a call. Stop strings are detected only in `final`,
    not in the model's reasoning.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], options: AnswerOptions
    ) -> None:
        self.in_channels = options.chat and supports_harmony(tokenizer)
        self._channels: HarmonyParser | None = None
        self._forced: ToolCallParser | None = None  # in the channel `final`
        self._parts: TextParts | None = None
        if self.in_channels:
            self._channels = HarmonyParser(tokenizer, prompt_ids)
            if options.forced_calls:
                self._forced = ToolCallParser(FORCED, options.tools or {})
        else:
            self._parts = TextParts(
                tokenizer,
                prompt_ids,
                options.chat,
                options.tools,
                options.forced_calls,
                options.skip_special,
            )
        self._stops = StopStrings(options.stops, options.include_stop)
        self._unchecked = options.min_tokens  # tokens in which no stop string counts
        self._one_call = options.one_call
        self._final: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """The final text that `push` and `flush` have returned so far."""
        return "".join(self._final)

    def push(self, token_id: int) -> list[ChannelText]:
        """Process the next token; return the pieces it adds, if any. Sets `stopped`."""
        self._unchecked -= 1
        if self._parts is not None:
            return self._apply_stops(self._parts.push(token_id))
        return self._apply_stops(
            self._in_channels(self._channels.push(token_id) if self._channels else None)
        )

    def push_all(self, token_ids: Sequence[int]) -> list[ChannelText]:
        """Process all tokens of an answer that has no stop strings."""
        if self._parts is not None:
            return self._apply_stops(self._parts.push_all(token_ids))
        return [piece for token_id in token_ids for piece in self.push(token_id)]

    def flush(self) -> list[ChannelText]:
        """Return the text held back for a stop string; call it after the last token."""
        if self.stopped:
            return []
        if self._parts is not None:
            last = self._apply_stops(self._parts.flush())
        else:
            found = self._in_channels(self._channels.flush() if self._channels else None)
            last = self._apply_stops(found + (self._forced.flush() if self._forced else []))
        held = "" if self.stopped else self._stops.flush()
        self._final.append(held)
        return [*last, ChannelText(FINAL, held)] if held else last

    def _in_channels(self, piece: ChannelText | None) -> list[ChannelText]:
        if piece is not None and piece.channel == FINAL and self._forced is not None:
            return self._forced.push(piece.text)
        return [] if piece is None else [piece]

    def _apply_stops(self, pieces: Sequence[ChannelText]) -> list[ChannelText]:
        """Return the pieces up to what ends the answer."""
        found = []
        for piece in pieces:
            if self.stopped:
                break
            if piece.channel == FINAL:
                text = self._until_stop(piece.text)
                self._final.append(text)
                if text:
                    found.append(ChannelText(FINAL, text))
            else:
                found.append(piece)
                # gpt-oss ends its answer after a call by itself.
                self.stopped = (
                    self._one_call and piece.recipient is not None and self._parts is not None
                )
        return found

    def _until_stop(self, text: str) -> str:
        if self._unchecked >= 0:
            return text
        result = self._stops.push(text)
        self.stopped = result.stopped
        return result.text
