"""One online request: its prompts and answers as requests of the engine, and their events."""

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

from engine import Completion, GrammarError, Request, TokenLogprobs
from getp.errors import worded
from getp.job.formats.interface import JobRequest, Line, ResultContext
from getp.job.formats.jsonl import FORMAT
from getp.job.inputs import Source
from getp.job.job import Job
from getp.job.request_reader import RequestReader
from getp.openai.body import read_body
from getp.openai.parsed import BadRequestError
from getp.openai.response import response_body
from getp.serve import config
from getp.serve.engine_thread import EngineThread
from getp.serve.errors import ApiError, bad_request
from getp.serve.metrics import Metrics
from getp.text.answer_text import StopWatcher
from getp.text.samples import choose_samples, sample_params
from tokenizer import Tokenizer

_NAMES = {
    "max_positions": "the server's limit",
    "max_new_tokens": "'max_tokens'",
    "min_new_tokens": "'min_tokens'",
    "stop_ids": "'stop_token_ids'",
}  # what clients call settings that have another name in the engine


class Reader:
    """Turns bodies into requests; each that sets no seed gets its own."""

    def __init__(self, job: Job, tokenizer: Tokenizer, max_positions: int) -> None:
        self.tokenizer, self.max_positions = tokenizer, max_positions
        source = Source("request", (), FORMAT, range(0), 0, "", array("I"))
        self._reader = RequestReader(
            source,
            job.defaults,
            tokenizer,
            None,
            max_positions,
            lambda name: _NAMES.get(name, name),
        )
        self._count = 0

    def read(self, body: dict[str, Any], chat: bool) -> list[JobRequest]:
        """Return a request for each prompt of a body. Raises ApiError."""
        try:
            return [self._request(each, chat) for each in _one_prompt_each(body, chat)]
        except BadRequestError as error:
            raise bad_request(error) from error

    def prompt_ids(self, body: dict[str, Any], chat: bool) -> list[int]:
        """Return the token ids of a body with one prompt or a conversation. Raises ApiError."""
        try:
            parsed = read_body(body, chat)
            return self._reader.encode(parsed, chat, None)
        except BadRequestError as error:
            raise bad_request(error) from error

    def _request(self, body: dict[str, Any], chat: bool) -> JobRequest:
        parsed = read_body(body, chat)
        parsed.chat, parsed.openai = chat, True
        self._count += 1
        request = self._reader.request(Line(self._count, 1, b""), "", parsed)
        tokens = len(request.prompt_ids)
        if tokens + (request.params.max_new_tokens != 0) > self.max_positions:
            raise BadRequestError(
                "prompt_too_long",
                f"the prompt has {tokens} tokens, which leaves no room for an answer: the model's "
                f"limit here is {self.max_positions} tokens, prompt included",
            )
        return request


def _one_prompt_each(body: dict[str, Any], chat: bool) -> list[dict[str, Any]]:
    """Return the body once for each prompt: a text completion may have several."""
    prompts = body.get("prompt")
    if (
        chat
        or not isinstance(prompts, list)
        or not isinstance(next(iter(prompts), None), str | list)
    ):
        return [body]
    if len(prompts) > config.MAX_SAMPLES:
        raise BadRequestError("invalid_value", f"'prompt' has more than {config.MAX_SAMPLES} items")
    return [{**body, "prompt": prompt} for prompt in prompts]


class Event(NamedTuple):
    """What happened to an answer: exactly one of the last three is given."""

    prompt: int
    number: int  # of the answer to this prompt
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    completion: Completion | None = None


class _TokenSender(StopWatcher):
    """A StopWatcher that also passes each token on."""

    streams = True

    def __init__(self, call: "Call", request: JobRequest, prompt: int, number: int) -> None:
        super().__init__(call.tokenizer, request.prompt_ids, request.answer)
        self._call, self._event = call, Event(prompt, number)

    def __call__(self, token_id: int) -> bool:
        self._call.post(self._event._replace(token=token_id))
        return super().__call__(token_id)

    def send_logprobs(self, logprobs: TokenLogprobs) -> None:
        """Pass on the log-probabilities of the last token."""
        self._call.post(self._event._replace(logprobs=logprobs))


class Call:
    """An online request in the engine; used in the event loop."""

    def __init__(
        self,
        thread: EngineThread,
        tokenizer: Tokenizer,
        requests: Sequence[JobRequest],
        stream: bool,
        metrics: Metrics,
    ) -> None:
        """Submit the requests. Raises ApiError if there are too many.

        stream: also pass on single tokens.
        """
        self.tokenizer, self.requests = tokenizer, requests
        self._thread, self._metrics = thread, metrics
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._watchers: dict[tuple[int, int], StopWatcher] = {}
        self._arrived, self._left = time.perf_counter(), sum(each.best_of for each in requests)
        if self._left > config.MAX_SAMPLES:
            raise ApiError(
                400, f"at most {config.MAX_SAMPLES} answers (prompts times 'n')", "invalid_value"
            )
        started = [
            self._start(request, prompt, number, stream)
            for prompt, request in enumerate(requests)
            for number in range(request.best_of)
        ]
        finished = [self._receiver(*position) for position in self._watchers]
        self._numbers = thread.submit(started, finished)

    def _start(self, request: JobRequest, prompt: int, number: int, stream: bool) -> Request:
        params = sample_params(request.params, number, request.n, request.best_of)
        if stream:
            sender = _TokenSender(self, request, prompt, number)
            self._watchers[prompt, number] = sender
            notify = None if params.logprobs is None else sender.send_logprobs
            return Request(request.prompt_ids, params, on_token=sender, on_logprobs=notify)
        watcher = StopWatcher(self.tokenizer, request.prompt_ids, request.answer)
        self._watchers[prompt, number] = watcher
        return Request(request.prompt_ids, params, on_token=watcher)

    def _receiver(self, prompt: int, number: int) -> Any:
        return lambda completion: self.post(Event(prompt, number, completion=completion))

    def post(self, event: Event) -> None:
        """Pass on an event, from the engine's thread."""
        self._thread.mailbox.post(self._events.put_nowait, event)

    def close(self) -> None:
        """End what still runs, because the client has its answer or has hung up."""
        if self._left:
            self._left = 0
            self._thread.cancel(self._numbers)
            self._events.put_nowait(None)
            self._metrics.cancelled.inc()

    async def events(self) -> AsyncIterator[list[Event]]:
        """Yield the events, as many as there are at once, until every answer is complete."""
        while self._left:
            found = [await self._events.get()]
            while not self._events.empty():
                found.append(self._events.get_nowait())
            events = [event for event in found if event is not None]
            for event in events:
                if event.completion is not None:
                    self._left = max(self._left - 1, 0)
                    self._check(event, event.completion)
            if len(events) < len(found):
                return  # closed
            yield events

    def _check(self, event: Event, completion: Completion) -> None:
        """Count an answer. Raises ApiError if it failed."""
        watcher = self._watchers[event.prompt, event.number]
        if completion.error is None and watcher.error is None:
            return self._metrics.count(completion, self._arrived)
        self._metrics.failed.inc()
        self.close()
        if completion.error is None:
            raise ApiError(500, watcher.error or "", "internal_error")
        message = worded(completion.error, lambda name: _NAMES.get(name, repr(name)))
        refused = completion.finished > 0 and completion.finished == completion.arrived
        refused |= isinstance(completion.error, GrammarError)
        raise ApiError(400 if refused else 500, message, "request_error")

    async def completions(self) -> list[list[Completion]]:
        """Wait for all answers; returns those of each prompt. Raises ApiError.

        There are none if the client hung up.
        """
        found: list[list[Any]] = [[None] * each.best_of for each in self.requests]
        async for events in self.events():
            for event in events:
                if event.completion is not None:
                    found[event.prompt][event.number] = event.completion
        return [] if any(None in each for each in found) else found


def new_context(context: ResultContext) -> ResultContext:
    """Return the context of a response that is created now."""
    return replace(context, created=int(datetime.now().timestamp()))


def full_response(
    context: ResultContext,
    key: str,
    requests: Sequence[JobRequest],
    completions: Sequence[Sequence[Completion]],
) -> dict[str, Any]:
    """Return the body of a response with the answers to all prompts."""
    body: dict[str, Any] = {}
    for request, own in zip(requests, completions, strict=True):
        samples = choose_samples(own, request.n, request.params.logprobs is not None)
        answers = [context.answer(request, each) for each in samples.chosen]
        part = response_body(context, key, request.answer.chat, answers, samples)
        if not body:
            body = part
            continue
        first = len(body["choices"])
        body["choices"] += [
            {**choice, "index": first + index} for index, choice in enumerate(part["choices"])
        ]
        body["usage"] = {name: body["usage"][name] + part["usage"][name] for name in body["usage"]}
    return body
