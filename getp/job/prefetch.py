"""Prefetching: a background thread produces items before the consumer needs them."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

_Item = TypeVar("_Item")

_POLL_S = 0.1  # longest wait before a stop or the end is noticed
_CHUNK_ITEMS = 64  # items per queue operation, which costs more than producing most items


@dataclass(frozen=True)
class _Chunk(Generic[_Item]):
    """Items that pass through the queue together; the last chunk has the error, if any."""

    items: list[_Item]
    cost: int
    last: bool = False
    error: BaseException | None = None


class _CostQueue(queue.Queue[_Chunk[_Item]]):
    """A queue whose size is the total cost of its chunks, not their number."""

    def _init(self, maxsize: int) -> None:
        super()._init(maxsize)
        self._cost = 0

    def _qsize(self) -> int:
        return self._cost

    def _put(self, item: _Chunk[_Item]) -> None:
        super()._put(item)
        self._cost += item.cost

    def _get(self) -> _Chunk[_Item]:
        chunk: _Chunk[_Item] = super()._get()
        self._cost -= chunk.cost
        return chunk


class Prefetcher(Generic[_Item]):
    """Iterates over `items` in a thread, ahead of the consumer by at most the total cost `limit`.

    An exception of the iterator is raised in the consumer. With `arrange`, items are consumed in
    windows of the total cost `limit`, each in the order that `arrange` returns.
    """

    def __init__(
        self,
        items: Iterable[_Item],
        cost: Callable[[_Item], int],
        limit: int,
        arrange: Callable[[list[_Item]], list[_Item]] | None = None,
    ) -> None:
        self._items = items
        self._cost = cost
        self._limit = limit
        self._arrange = arrange
        self._queue: _CostQueue[_Item] = _CostQueue(limit)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)

    def __enter__(self) -> "Prefetcher[_Item]":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join(timeout=5)  # the thread may be reading an endless line

    def until(self, stopped: Callable[[], bool]) -> Iterator[_Item]:
        """Yield the items until they end, or until `stopped` returns true."""
        return (item for item in self._arranged(stopped, _POLL_S) if item is not None)

    def poll(self) -> Iterator[_Item | None]:
        """Yield the items until they end; None if the next one is not ready yet."""
        return self._arranged(self._closed.is_set, 0)

    def _arranged(self, stopped: Callable[[], bool], wait_s: float) -> Iterator[_Item | None]:
        """Yield the items in order; None after each wait of `wait_s` for the next one."""
        window: list[_Item] = []
        missing = self._limit  # cost that the window still lacks
        while not stopped():
            try:
                chunk = self._queue.get(wait_s > 0, wait_s)
            except queue.Empty:
                yield None
                continue
            window += chunk.items
            missing -= chunk.cost
            if self._arrange is None or chunk.last or missing <= 0:
                for item in self._arrange(window) if self._arrange else window:
                    if stopped():
                        return
                    yield item
                window, missing = [], self._limit
            if chunk.error is not None:
                raise chunk.error
            if chunk.last:
                return

    def _fill(self) -> None:
        error: BaseException | None = None
        chunk: list[_Item] = []
        cost, chunk_cost = 0, self._limit // 8
        try:
            for item in self._items:
                chunk.append(item)
                cost += self._cost(item)
                # If the queue is empty, the consumer may be waiting: pass the item on at once.
                if cost >= chunk_cost or len(chunk) == _CHUNK_ITEMS or self._queue.empty():
                    if not self._put(_Chunk(chunk, cost)):
                        return
                    chunk, cost = [], 0
        except BaseException as raised:
            error = raised
        self._put(_Chunk(chunk, max(cost, 1), True, error))

    def _put(self, chunk: _Chunk[_Item]) -> bool:
        """Put a chunk into the queue when there is room; return false if this was closed first."""
        while not self._closed.is_set():
            try:
                self._queue.put(chunk, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False
