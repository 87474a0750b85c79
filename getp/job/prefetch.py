"""Work done ahead in a background thread, so that who takes the results does not wait."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


class Prefetcher(Generic[_Item]):
    """Iterates over `items` in a thread and keeps what comes, up to a total cost, until taken.

    An exception of theirs is raised where the items are taken. With `arrange` they are taken in
    windows, each as full as the total cost allows, in the order that it gives a window.
    """

    def __init__(
        self,
        items: Iterable[_Item],
        cost: Callable[[_Item], int],
        most: int,
        arrange: Callable[[list[_Item]], list[_Item]] | None = None,
    ) -> None:
        self._items = items
        self._cost = cost
        self._most = most
        self._arrange = arrange
        self._window: deque[_Item] = deque()  # arranged, and next to be taken
        self._kept: deque[_Item] = deque()
        self._kept_cost = 0
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Prefetcher[_Item]":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=5)  # one endless line must not keep us

    def until(self, stopped: Callable[[], bool]) -> Iterator[_Item]:
        """Yield the items, in order, until their end or until `stopped`."""
        while not stopped():
            if self._window:
                yield self._window.popleft()
                continue
            with self._changed:
                # With a limit, so that a signal is noticed while nothing comes.
                self._changed.wait_for(lambda: self._ready() or self._ended, timeout=0.1)
                if self._kept and (self._ready() or self._ended):
                    self._take()
                elif not self._ended:
                    continue
                elif self._error is not None:
                    raise self._error
                else:
                    return

    def _ready(self) -> bool:
        if self._arrange is None:
            return bool(self._kept)
        return self._kept_cost >= self._most

    def _take(self) -> None:
        """Move what may be taken now to the window."""
        if self._arrange is None:
            item = self._kept.popleft()
            self._kept_cost -= self._cost(item)
            self._window.append(item)
        else:
            self._window.extend(self._arrange(list(self._kept)))
            self._kept.clear()
            self._kept_cost = 0
        self._changed.notify_all()

    def _work(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._changed.wait_for(lambda: self._kept_cost < self._most or self._closed)
                    if self._closed:
                        return
                    self._kept.append(item)
                    self._kept_cost += self._cost(item)
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
