"""One replica: an engine in its own process, which receives requests in chunks. Without Ray."""

import os
import pickle
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine import (
    Completion,
    Engine,
    EngineConfig,
    EngineStats,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from getp import __version__, fingerprint
from getp.checkpoints import load_tokenizer
from getp.errors import GetpError
from getp.text.answer_text import AnswerOptions, StopWatcher
from tokenizer import Tokenizer

RequestMessage = tuple[Sequence[int], SamplingParams, int, AnswerOptions, int, bool]
"""A request in serializable form: prompt ids, parameters, id, what its text depends on, priority,
and whether its tokens are sent as soon as they are known."""

StreamedToken = tuple[int, int, int, TokenLogprobs | None]
"""The id of a request, the position of a token in its output, the token, its log-probabilities."""


def request_message(request: Request) -> RequestMessage:
    """Convert a request for sending. Raises TypeError unless `on_token` is None or StopWatcher."""
    options, streams = AnswerOptions(), False
    if request.on_token is not None:
        if not isinstance(request.on_token, StopWatcher):
            raise TypeError("on_token of a request to replicas must be a StopWatcher")
        options, streams = request.on_token.options, request.on_token.streams
    return (
        request.prompt_ids,
        request.params,
        request.request_id,
        options,
        request.priority,
        streams,
    )


@dataclass(frozen=True)
class ReplicaSetup:
    """The arguments of every replica. Paths are resolved on the replica's host."""

    checkpoint: str
    tokenizer: str
    identity: str  # fingerprint of the driver's checkpoint
    version: str  # version of the driver's getp
    make_engine: Callable[..., Engine]
    config: EngineConfig


@dataclass(frozen=True)
class StartReport:
    """The message of a replica whose engine is warm."""

    host: str
    pid: int
    device: str
    max_batch_size: int
    rounding: Mapping[str, Any]  # as Engine.rounding
    max_positions: int  # as Engine.max_positions


@dataclass(frozen=True)
class Results:
    """Finished requests, each with its text error or None, and the replica's statistics."""

    finished: list[tuple[Completion, str | None]]
    tokens: list[StreamedToken]  # of requests that are streamed
    stats: EngineStats
    notices: list[str]
    peak_memory: int
    peak_gpu_memory: int


class Replica:
    """Runs submitted requests and returns their results when they are collected.

    The engine runs in a thread; `submit` and `collect` may be called from any other thread.
    Requests and results are pickled in chunks, which keeps the driver's cost per request low.
    """

    def __init__(self, setup: ReplicaSetup) -> None:
        self._setup = setup
        self._changed = threading.Condition()
        self._inbox: deque[Request] = deque()
        self._running = 0  # requests inside the engine
        self._watchers: dict[int, StopWatcher] = {}  # of requests with stop strings
        self._finished: list[tuple[Completion, str | None]] = []
        self._tokens: list[StreamedToken] = []
        self._notices: list[str] = []
        self._error: BaseException | None = None
        self._tokenizer: Tokenizer | None = None

    @cached_property
    def _engine(self) -> Engine:
        """The engine, created when it is first needed. Raises the errors of Engine, GetpError."""
        setup, host = self._setup, socket.gethostname()
        if setup.version != __version__:
            raise GetpError(
                f"host {host} has getp {__version__}, but the driver has {setup.version}: install "
                "the same version on every host"
            )
        if not Path(setup.checkpoint).exists():
            raise GetpError(f"host {host} has no {setup.checkpoint}: every host needs a copy of it")
        if fingerprint.of_checkpoint(Path(setup.checkpoint)) != setup.identity:
            raise GetpError(
                f"{setup.checkpoint} on host {host} differs from the checkpoint on the driver's "
                "host"
            )
        engine = setup.make_engine(setup.checkpoint, setup.config, notice=self._notices.append)
        engine.tokenizer_json = lambda: load_tokenizer(setup.tokenizer).to_json()
        return engine

    def rounding(
        self, preferred: Mapping[str, Any] | None, expected_s: float | None
    ) -> Mapping[str, Any]:
        """Choose the kernels, as Engine.choose_kernels; return the rounding. Raises as `start`."""
        self._engine.choose_kernels(preferred, expected_s)
        return self._engine.rounding

    def start(self, kernels: Mapping[str, Any]) -> StartReport:
        """Create the engine and warm it up. Raises the errors of the engine, and GetpError.

        kernels: the choices of the first replica, so that all replicas round alike.
        """
        self._engine.choose_kernels(kernels)
        self._engine.warm_up()
        threading.Thread(target=self._run, daemon=True).start()
        summary = self._engine.summary()
        return StartReport(
            socket.gethostname(),
            os.getpid(),
            summary.device,
            summary.max_batch_size,
            self._engine.rounding,
            self._engine.max_positions,
        )

    def submit(self, chunk: bytes) -> None:
        """Accept a pickled list of `RequestMessage`."""
        messages: list[RequestMessage] = pickle.loads(chunk)
        requests = [self._request(*message) for message in messages]
        with self._changed:
            self._inbox.extend(requests)
            self._changed.notify_all()

    def cancel(self, request_id: int) -> None:
        """End a request that is not finished."""
        with self._changed:
            waiting = [each for each in self._inbox if each.request_id == request_id]
            for request in waiting:
                self._inbox.remove(request)
                self._finished.append((Completion(request_id, [], "cancelled"), None))
            self._changed.notify_all()
        if not waiting:
            self._engine.cancel(request_id)

    def collect(self, delay_s: float, timeout_s: float) -> bytes:
        """Return pickled `Results`, `delay_s` after the first result or token, or at the timeout.

        Raises the error that ended the engine.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._finished or self._tokens or self._error, timeout=timeout_s
            )
        if self._error is None:
            time.sleep(delay_s)
        with self._changed:
            finished, self._finished = self._finished, []
            tokens, self._tokens = self._tokens, []
        if self._error is not None and not finished:
            raise self._error
        notices, self._notices[:] = list(self._notices), []
        summary = self._engine.summary()
        peaks = summary.peak_memory_bytes, summary.peak_gpu_memory_bytes or 0
        return pickle.dumps(Results(finished, tokens, summary.stats, notices, *peaks))

    def _request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        request_id: int,
        options: AnswerOptions,
        priority: int,
        streams: bool,
    ) -> Request:
        watcher: StopWatcher | None = None
        if options.stops or options.one_call:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._setup.tokenizer)
            watcher = self._watchers[request_id] = StopWatcher(self._tokenizer, prompt_ids, options)
        if not streams:
            return Request(prompt_ids, params, request_id, watcher, priority)
        sender = _TokenSender(self._send, request_id, watcher, params.logprobs is not None)
        notify = None if params.logprobs is None else sender.add_logprobs
        return Request(prompt_ids, params, request_id, sender, priority, notify)

    def _send(self, token: StreamedToken) -> None:
        with self._changed:
            self._tokens.append(token)
            self._changed.notify_all()

    def _requests(self) -> Iterator[Request | None]:
        """Yield the requests in the inbox; block while both inbox and engine are empty."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._inbox or self._running)
                request = self._inbox.popleft() if self._inbox else None
                self._running += request is not None
            yield request

    def _run(self) -> None:
        """Run the engine until it fails."""
        try:
            for completion in self._engine.generate(self._requests()):
                watcher = self._watchers.pop(completion.request_id, None)
                reason = None if watcher is None else watcher.error
                with self._changed:
                    self._running -= 1
                    self._finished.append((completion, reason))
                    self._changed.notify_all()
        except BaseException as error:  # the next `collect` raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()


class _TokenSender:
    """Sends the tokens of a request, each with its log-probabilities if there are any."""

    def __init__(
        self,
        send: Callable[[StreamedToken], None],
        request_id: int,
        watcher: StopWatcher | None,
        with_logprobs: bool,
    ) -> None:
        self._send, self._id, self._watcher = send, request_id, watcher
        self._with_logprobs, self._count, self._token = with_logprobs, 0, 0

    def __call__(self, token_id: int) -> bool:
        """Return whether the request ends with this token."""
        self._token = token_id
        if not self._with_logprobs:
            self._send((self._id, self._count, token_id, None))
            self._count += 1
        return self._watcher is not None and self._watcher(token_id)

    def add_logprobs(self, logprobs: TokenLogprobs) -> None:
        """Send the last token with these."""
        self._send((self._id, self._count, self._token, logprobs))
        self._count += 1
