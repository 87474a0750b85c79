"""Which replica runs which request: bookkeeping alone, no Ray, no clock, no thread.

`Cluster` deals by it, and so does the simulation in benchmarks/cluster.py.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

_RUNS = 8  # in so many runs a replica gets what is dealt to it at once
_AT_ONCE = 128  # requests at most that are dealt to a replica at once


def window(batch: int) -> int:
    """Return how many requests a replica holds at most whose engine runs `batch` at a time.

    What it holds beyond its batch starts while results are on their way here and new requests
    on their way back. More would only wait there while another replica has nothing.
    """
    return batch + max(1, batch // 4)


def linger_s(replicas: int) -> float:
    """Return how long a replica keeps a result so that others go with it.

    With it the driver takes at most 1,000 messages a second, however many replicas there are.
    """
    return max(0.01, 0.001 * replicas)


@dataclass
class _Replica(Generic[Item]):
    window: int
    requests: dict[int, Item] = field(default_factory=dict)  # by their ids
    since: float = 0.0  # it has had requests


class Dispatcher(Generic[Item]):
    """Knows what every replica holds, and deals requests to those with room, the emptiest first.

    Times (`now`) are seconds on any clock.
    """

    def __init__(self) -> None:
        self.busy_s: defaultdict[int, float] = defaultdict(float)  # a replica had requests
        self.lost: dict[int, int] = {}  # request → how many replicas died while they held it
        self.unfinished = 0  # requests that were given to us and have no result yet
        self._replicas: dict[int, _Replica[Item]] = {}
        self._open: set[int] = set()  # replicas with room
        self._room = 0  # of all replicas together
        self._again: deque[tuple[int, Item]] = deque()  # of dead replicas: dealt before others
        self._suspects: deque[tuple[int, Item]] = deque()  # lost twice and more: dealt last, alone

    def join(self, replica: int, window: int) -> None:
        """Begin to deal to a replica, which holds so many requests at most."""
        self._replicas[replica] = _Replica(window)
        self._open.add(replica)
        self._room += window

    def leave(self, replica: int, now: float) -> list[int]:
        """Take out a dead replica; return the ids of what it held, which others will get.

        A request that two replicas died with may be what they died of: it runs last and alone, so
        that it does not take one replica after another from the others.
        """
        left = self._replicas.pop(replica, None)
        if left is None:
            return []
        self._open.discard(replica)
        self._room -= left.window - len(left.requests)
        if left.requests:
            self.busy_s[replica] += now - left.since
        for request_id, item in left.requests.items():
            self.lost[request_id] = self.lost.get(request_id, 0) + 1
            where = self._again if self.lost[request_id] == 1 else self._suspects
            where.append((request_id, item))
        return list(left.requests)

    @property
    def wanted(self) -> int:
        """How many new requests can be dealt now: at most a part of each replica's window.

        Dealt part by part, requests that come slowly reach every replica at the same time.
        """
        return max(0, min(self._room, _AT_ONCE * len(self._open)) - len(self._again))

    def deal(
        self, new: Sequence[tuple[int, Item]], last: bool, now: float
    ) -> dict[int, list[Item]]:
        """Deal new requests, (id, request) each, and those of dead replicas: replica → requests.

        No more than `wanted` may be new; `last`: no more will come. Neighbours stay together in
        runs, as they may share a beginning; the runs of a replica lie apart, as neighbours may be
        of one length.
        """
        self.unfinished += len(new)
        waiting = deque(new)
        waiting.extendleft(reversed(self._again))
        self._again.clear()
        dealt: defaultdict[int, list[Item]] = defaultdict(list)
        if not waiting:
            if last and self._suspects:
                self._deal_suspects(dealt, now)
            return dealt
        emptiest = [(self._load(index), index) for index in self._open]
        heapq.heapify(emptiest)
        run = max(1, len(waiting) // (_RUNS * max(1, len(emptiest))))
        while waiting and emptiest:
            _, index = heapq.heappop(emptiest)
            replica = self._replicas[index]
            count = min(run, replica.window - len(replica.requests), len(waiting))
            for _ in range(count):
                dealt[index].append(self._give(index, waiting.popleft(), now))
            if len(replica.requests) < replica.window:
                heapq.heappush(emptiest, (self._load(index), index))
        self._again.extend(waiting)  # more had died than there is room for
        return dealt

    def finished(self, replica: int, request_ids: Iterable[int], now: float) -> list[Item]:
        """Note results of a replica; return their requests."""
        holder = self._replicas[replica]
        items = [holder.requests.pop(request_id) for request_id in request_ids]
        self._room += len(items)
        self.unfinished -= len(items)
        if items:
            self._open.add(replica)
            if not holder.requests:
                self.busy_s[replica] += now - holder.since
        return items

    def _deal_suspects(self, dealt: dict[int, list[Item]], now: float) -> None:
        """Give each idle replica one of them."""
        for index in sorted(self._open):
            if self._suspects and not self._replicas[index].requests:
                dealt[index] = [self._give(index, self._suspects.popleft(), now)]

    def _give(self, index: int, request: tuple[int, Item], now: float) -> Item:
        replica = self._replicas[index]
        if not replica.requests:
            replica.since = now
        replica.requests[request[0]] = request[1]
        self._room -= 1
        if len(replica.requests) == replica.window:
            self._open.discard(index)
        return request[1]

    def _load(self, index: int) -> float:
        replica = self._replicas[index]
        return len(replica.requests) / replica.window
