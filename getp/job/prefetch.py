"""Items made in a background thread, so that taking them does not wait for them to be made."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

_Item = TypeVar("_Item")

_POLL_S = 0.1  # how long a wait may hide a signal or the end


@dataclass(frozen=True)
class _End:
    """The end of the items, and the error that ended them."""

    error: BaseException | None


class _CostQueue(queue.Queue[tuple[_Item | _End, int]]):
    """A queue whose size is the total cost of its items, each 1 or more, not their number."""

    def _init(self, maxsize: int) -> None:
        super()._init(maxsize)
        self._cost = 0

    def _qsize(self) -> int:
        return self._cost

    def _put(self, item: tuple[_Item | _End, int]) -> None:
        super()._put(item)
        self._cost += item[1]

    def _get(self) -> tuple[_Item | _End, int]:
        item = super()._get()
        self._cost -= item[1]
        return item


class Prefetcher(Generic[_Item]):
    """Iterates over `items` in a thread, ahead of the caller up to the total cost `limit`.

    An exception of theirs is raised where the items are taken. With `arrange`, items are taken in
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
        end: _End | None = None
        while end is None and not stopped():
            window, end = self._window(stopped)
            for item in self._arrange(window) if self._arrange and window else window:
                if stopped():
                    return
                yield item
        if end is not None and end.error is not None:
            raise end.error

    def _window(self, stopped: Callable[[], bool]) -> tuple[list[_Item], _End | None]:
        """Take the next window (without `arrange`, one item), and the end if it is reached."""
        window: list[_Item] = []
        missing = 1 if self._arrange is None else self._limit
        while missing > 0 and not stopped():
            try:
                item, cost = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if isinstance(item, _End):
                return window, item
            window.append(item)
            missing -= cost
        return window, None

    def _fill(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                if not self._put(item, self._cost(item)):
                    return
        except BaseException as raised:
            error = raised
        self._put(_End(error), 1)

    def _put(self, item: _Item | _End, cost: int) -> bool:
        """Put an item into the queue when there is room; return whether it still is wanted."""
        while not self._closed.is_set():
            try:
                self._queue.put((item, cost), timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False
