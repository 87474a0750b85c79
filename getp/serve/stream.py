"""The answers to a request as they are generated: chunks in OpenAI's form."""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine import Completion, TokenLogprobs
from getp.job.formats.interface import JobRequest, ResultContext
from getp.openai.response import chat_logprobs, text_logprobs
from getp.serve.errors import ApiError
from getp.serve.online import Call, Event
from getp.text.answer_text import AnswerText
from tokenizer.harmony import FINAL, ChannelText

Chunk = dict[str, Any]


@dataclass
class _Choice:
    """An answer so far."""

    request: JobRequest
    index: int
    text: AnswerText
    length: int = 0  # characters of the text so far
    token: int | None = None  # the last one, until its log-probabilities are known
    pieces: list[ChannelText] = field(default_factory=list)  # its text
    calls: dict[int, int] = field(default_factory=dict)  # number of a message → of its tool call
    completion: Completion | None = None


class ChunkStream:
    """Turns the events of a call into the pieces of a stream."""

    def __init__(
        self, context: ResultContext, key: str, call: Call, stop_ids: frozenset[int], usage: bool
    ) -> None:
        """stop_ids: of the model. usage: end with a chunk that counts tokens."""
        self._context, self._key, self._call = context, key, call
        self._stop_ids, self._usage = stop_ids, usage
        self._chat = call.requests[0].answer.chat
        self._choices: dict[tuple[int, int], _Choice] = {}
        for prompt, request in enumerate(call.requests):
            for number in range(request.n):
                text = AnswerText(call.tokenizer, request.prompt_ids, request.answer)
                choice = _Choice(request, len(self._choices), text)
                self._choices[prompt, number] = choice

    async def pieces(self, first: Sequence[Event]) -> AsyncIterator[bytes]:
        """Yield the stream's pieces; first: events that were taken from the call already."""
        yield _encoded([self._chunk(self._opening(choice)) for choice in self._choices.values()])
        try:
            yield _encoded(self._chunks(first))
            async for events in self._call.events():
                chunks = self._chunks(events)
                if chunks:
                    yield _encoded(chunks)
        except ApiError as error:  # the status has been sent already
            yield _encoded([error.body()])
            return
        if any(choice.completion is None for choice in self._choices.values()):
            return  # the client has hung up
        if self._usage:
            yield _encoded([{**self._chunk(), "usage": self._counts()}])
        yield b"data: [DONE]\n\n"

    def _chunks(self, events: Sequence[Event]) -> list[Chunk]:
        return [
            self._chunk(part)
            for event in events
            for part in self._parts(self._choices[event.prompt, event.number], event)
        ]

    def _parts(self, choice: _Choice, event: Event) -> list[Chunk]:
        """Return the choices of the chunks that an event adds."""
        if event.token is not None:
            self._take(choice, event.token)
            if choice.request.params.logprobs is not None:
                return []  # which come next
            pieces, choice.pieces = choice.pieces, []
            return [self._part(choice, piece, None) for piece in pieces]
        if event.logprobs is not None:
            return self._parts_with_logprobs(choice, event.logprobs)
        assert event.completion is not None
        choice.completion = event.completion
        parts = [self._part(choice, piece, None) for piece in choice.text.flush()]
        return [*parts, self._closing(choice, event.completion.finish_reason)]

    def _take(self, choice: _Choice, token: int) -> None:
        """Add a token to an answer's text."""
        choice.token = token
        request = choice.request
        model_ids = frozenset() if request.params.ignore_eos else self._stop_ids
        ends = token in request.params.stop_ids or token in model_ids
        if choice.text.stopped or (ends and not request.answer.include_stop):
            return
        pieces = choice.text.push(token)
        choice.pieces += [each for each in pieces if each.text or each.recipient is not None]

    def _parts_with_logprobs(self, choice: _Choice, logprobs: TokenLogprobs) -> list[Chunk]:
        """Return the parts of the last token's text, the first with its log-probabilities."""
        assert choice.token is not None
        sampled = Completion(0, [choice.token], "stop", logprobs=[logprobs])
        tokenizer = self._call.tokenizer
        found: dict[str, Any] | None
        if self._chat:
            found = chat_logprobs(sampled, tokenizer)
        else:
            found = text_logprobs(sampled, tokenizer, 0)
            assert found is not None
            found["text_offset"] = [choice.length]
        pieces, choice.pieces = choice.pieces or [ChannelText(FINAL, "")], []
        first = self._part(choice, pieces[0], found)
        return [first, *(self._part(choice, piece, None) for piece in pieces[1:])]

    def _part(self, choice: _Choice, piece: ChannelText, logprobs: Any) -> Chunk:
        choice.length += len(piece.text)
        part: Chunk = {"index": choice.index, "logprobs": logprobs, "finish_reason": None}
        if not self._chat:
            return {**part, "text": piece.text}
        return {**part, "delta": self._delta(choice, piece)}

    def _delta(self, choice: _Choice, piece: ChannelText) -> dict[str, Any]:
        if piece.recipient is None:
            name = "content" if piece.channel == FINAL else "reasoning_content"
            return {name: piece.text}
        number = choice.calls.get(piece.message)
        call: dict[str, Any] = {"function": {"arguments": piece.text}}
        if number is None:
            number = choice.calls[piece.message] = len(choice.calls)
            call["function"]["name"] = piece.recipient.removeprefix("functions.")
            key = self._key if choice.index == 0 else f"{self._key}_{choice.index}"
            call |= {"id": piece.call_id or f"call_{key}_{number}", "type": "function"}
        return {"tool_calls": [{"index": number, **call}]}

    def _opening(self, choice: _Choice) -> Chunk:
        part: Chunk = {"index": choice.index, "logprobs": None, "finish_reason": None}
        if self._chat:
            return {**part, "delta": {"role": "assistant", "content": ""}}
        return {**part, "text": ""}

    def _closing(self, choice: _Choice, reason: str) -> Chunk:
        if choice.calls and reason == "stop":
            reason = "tool_calls"
        part: Chunk = {"index": choice.index, "logprobs": None, "finish_reason": reason}
        return {**part, "delta": {}} if self._chat else {**part, "text": ""}

    def _chunk(self, part: Chunk | None = None) -> Chunk:
        """Return a chunk with one choice, or without any."""
        context = self._context
        return {
            "id": f"chatcmpl-{self._key}" if self._chat else f"cmpl-{self._key}",
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": context.created,
            "model": context.model,
            "choices": [] if part is None else [part],
            **({"usage": None} if self._usage else {}),
        }

    def _counts(self) -> dict[str, int]:
        done = [choice.completion for choice in self._choices.values()]
        output = sum(len(each.token_ids) for each in done if each is not None)
        prompt = sum(len(request.prompt_ids) for request in self._call.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        }


def _encoded(chunks: Sequence[Chunk]) -> bytes:
    """Return server-sent events, one for each chunk."""
    lines = (json.dumps(chunk, separators=(",", ":")) for chunk in chunks)
    return "".join(f"data: {line}\n\n" for line in lines).encode()
