"""The thread that runs the engine: online requests first, then those of batches."""

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from engine import Completion, EngineStats, Request, RequestError
from getp.job.job_engine import JobEngine
from getp.serve.errors import ApiError

Finished = Callable[[Completion], None]
"""Receives the completion of a request, in the engine's thread."""

ONLINE, BATCH = 0, 1
"""Priorities of requests."""

_POLL_S = 0.05  # longest wait for a batch whose next request is not read yet
_GROUP = 32  # of the batch, one in so many may wait in a GPU's engine, to be admitted in a group


class ServeEngine(JobEngine, Protocol):
    """An engine that takes requests as they come, and ends single ones."""

    @property
    def max_running(self) -> int:
        """Return the number of requests that can run at once; known after `warm_up`."""

    @property
    def max_positions(self) -> int:
        """Return the most tokens of a request, prompt included; known after `warm_up`."""

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """Run the requests; yield completions in any order. None: none is available now."""

    def cancel(self, request_id: int) -> None:
        """End a request that runs, from any thread."""


class BatchSource(Protocol):
    """Requests that fill what online requests leave free. Both are used in the engine's thread."""

    def take(self, number: int) -> tuple[Request, Finished] | None:
        """Return the next request; None if there is none now. number: its id in the engine."""

    @property
    def more(self) -> bool:
        """Whether there are requests now or soon."""


class Mailbox:
    """Calls functions in the event loop, from any thread and with few wake-ups."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._scheduled = False

    def connect(self) -> None:
        """Use the running event loop from now on."""
        self._loop = asyncio.get_running_loop()

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function soon; calls keep their order."""
        self._calls.append((function, args))
        if not self._scheduled and self._loop is not None and not self._loop.is_closed():
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._scheduled = False
        while self._calls:
            function, args = self._calls.popleft()
            function(*args)


class EngineThread:
    """Owns the engine: only its thread calls `warm_up`, `generate` and `finish`."""

    def __init__(self, engine: ServeEngine, max_queue: int) -> None:
        """max_queue: online requests that may wait for others to finish."""
        self.engine = engine
        self.mailbox = Mailbox()
        self.batches: BatchSource | None = None
        self.error: BaseException | None = None
        self.warm = threading.Event()  # the engine is warm, or its start has failed
        self.ended = threading.Event()
        self._max_queue = max_queue
        self._queue: deque[tuple[Request, Finished]] = deque()
        self._lock = threading.Lock()
        self._online = 0  # requests in the queue or in the engine
        self._numbers = itertools.count()
        # Of requests in the engine, by id: who receives the completion, and whether it is online.
        self._owners: dict[int, tuple[Finished, bool]] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread, which warms up the engine."""
        self._thread.start()

    @property
    def running(self) -> int:
        """The number of requests in the engine, of both kinds, those that wait there included."""
        return len(self._owners)

    @property
    def queued(self) -> int:
        """The number of online requests that the engine has not taken."""
        return len(self._queue)

    @property
    def online(self) -> int:
        """The number of online requests, those in the queue included."""
        return self._online

    def stats(self) -> EngineStats:
        """Return a copy of the engine's counters; what they say of the last step is true now."""
        stats = replace(self.engine.stats)
        if not self._owners:  # the last step did not know that it was the last
            stats.running = stats.waiting = stats.used_kv_blocks = 0
        return stats

    def submit(self, requests: Sequence[Request], finished: Sequence[Finished]) -> list[int]:
        """Queue online requests; returns their ids. Raises ApiError if the queue is full."""
        if self.error is not None or self._stopping:
            raise ApiError(503, "the server is stopping", "stopping")
        with self._lock:
            if (
                self._online
                and self._online + len(requests) > self.engine.max_running + self._max_queue
            ):
                raise ApiError(
                    429,
                    f"{self._online} requests are running or waiting already: try again later",
                    "queue_full",
                    headers={"retry-after": "1"},
                )
            self._online += len(requests)
            numbers = [next(self._numbers) for _ in requests]
            self._queue.extend(
                (replace(request, request_id=number, priority=ONLINE), each)
                for request, number, each in zip(requests, numbers, finished, strict=True)
            )
        self._wake.set()
        return numbers

    def cancel(self, numbers: Sequence[int]) -> None:
        """End requests that are not finished. Those that still wait in the queue get no result."""
        wanted = set(numbers)
        with self._lock:
            kept = [item for item in self._queue if item[0].request_id not in wanted]
            self._online -= len(self._queue) - len(kept)
            self._queue = deque(kept)
        for number in wanted:
            self.engine.cancel(number)

    def wake(self) -> None:
        """Make an idle engine look for requests of batches."""
        self._wake.set()

    def stop(self, cancel: bool) -> None:
        """End the thread when nothing runs any more; cancel: end what still runs."""
        self._stopping = True
        if cancel:
            for number in list(self._owners):
                self.engine.cancel(number)
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of the thread; return whether it has ended."""
        return self.ended.wait(timeout_s)

    def _run(self) -> None:
        try:
            self.engine.warm_up()
            self.warm.set()
            for completion in self.engine.generate(self._requests()):
                self._finish(completion)
        except BaseException as error:
            self.error = error
            self._fail(error)
        finally:
            self.warm.set()
            self.engine.finish()
            self.ended.set()

    def _finish(self, completion: Completion) -> None:
        finished, online = self._owners.pop(completion.request_id)
        if online:
            with self._lock:
                self._online -= 1
        finished(completion)

    def _requests(self) -> Iterator[Request | None]:
        """Yield requests for the engine; None if there is none now, but others still run."""
        while True:
            found = self._next()
            if found is not None:
                request, finished = found
                self._owners[request.request_id] = finished, request.priority == ONLINE
                yield request
            elif self._owners:
                yield None
            elif self._stopping:
                return
            else:
                more = self.batches is not None and self.batches.more
                self._wake.wait(_POLL_S if more else None)
                self._wake.clear()

    def _next(self) -> tuple[Request, Finished] | None:
        with self._lock:
            if self._queue:
                return self._queue.popleft()
        surplus = self.engine.max_running // _GROUP if self.engine.device.type == "cuda" else 0
        if (
            self._stopping
            or self.batches is None
            or self.running >= self.engine.max_running + surplus
        ):
            return None
        number = next(self._numbers)
        found = self.batches.take(number)
        if found is None:
            return None
        request, finished = found
        return replace(request, request_id=number, priority=BATCH), finished

    def _fail(self, error: BaseException) -> None:
        """Complete online requests with an error, so that no client waits for ever.

        Those of batches are left for the next start.
        """
        with self._lock:
            failed = [(request.request_id, finished) for request, finished in self._queue]
            self._queue.clear()
            self._online = 0
        failed += [(number, each) for number, (each, online) in self._owners.items() if online]
        self._owners.clear()
        reason = RequestError("the engine has stopped: {reason}", reason=str(error))
        for number, finished in failed:
            finished(Completion(number, [], "error", reason))
