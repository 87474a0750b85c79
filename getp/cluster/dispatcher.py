"""The assignment of requests to replicas: bookkeeping only, without Ray, clocks or threads.

`Cluster` assigns requests with it, and so does the simulation in benchmarks/simulate_cluster.py.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

_RUNS_PER_REPLICA = 8  # runs of neighbouring requests in one assignment to a replica
_MAX_ASSIGNED = 128  # requests assigned to a replica at once
_MAX_GROUP = 8  # requests that stay together even if their replica gets more than others


def max_in_flight(batch: int) -> int:
    """Return the maximum number of requests in a replica whose engine runs `batch` at a time.

    The surplus keeps the engine busy while results are sent to the driver and new requests are
    sent back. A larger surplus would only queue there while other replicas are idle.
    """
    return batch + max(1, batch // 4)


def collect_delay_s(replicas: int) -> float:
    """Return the seconds for which a replica collects more results before it returns the first.

    The delay limits the driver to 1,000 messages per second, however many replicas there are.
    """
    return max(0.01, 0.001 * replicas)


@dataclass
class _Replica(Generic[Item]):
    capacity: int
    requests: dict[int, Item] = field(default_factory=dict)  # by request id
    busy_since: float = 0.0

    @property
    def load(self) -> float:
        return len(self.requests) / self.capacity

    @property
    def free(self) -> int:
        return max(0, self.capacity - len(self.requests))


class Dispatcher(Generic[Item]):
    """Tracks the requests of every replica, and assigns new ones to the least loaded replicas.

    Times (`now`) are seconds on any clock. together: whether a request shares its prompt with the
    one before: up to 8 such requests run on the same replica, which computes their prompt once.
    """

    def __init__(self, together: Callable[[Item, Item], bool] | None = None) -> None:
        self._together = together
        self._group: deque[Item] = deque(maxlen=_MAX_GROUP)  # assigned last, sharing a prompt
        self._group_replica = -1
        self.busy_s: defaultdict[int, float] = defaultdict(float)  # time with requests, by replica
        self.losses: dict[int, int] = {}  # request → number of replicas that died while running it
        self.unfinished = 0  # requests received that have no result yet
        self._replicas: dict[int, _Replica[Item]] = {}
        self._available: set[int] = set()  # replicas that can take more requests
        self._free = 0  # requests that all replicas together can still take
        # Requests of dead replicas: lost once (assigned before new ones) or more often (run last
        # and alone).
        self._retries: deque[tuple[int, Item]] = deque()
        self._quarantine: deque[tuple[int, Item]] = deque()

    def add(self, replica: int, capacity: int) -> None:
        """Start to assign requests to a replica, at most `capacity` at a time."""
        self._replicas[replica] = _Replica(capacity)
        self._available.add(replica)
        self._free += capacity

    def remove(self, replica: int, now: float) -> list[int]:
        """Remove a dead replica; return the ids of its requests, which will be reassigned.

        A request that was lost with two replicas may be the cause of the crashes. It runs last and
        alone, so that it cannot crash a replica that is running other requests.
        """
        dead = self._replicas.pop(replica, None)
        if dead is None:
            return []
        self._available.discard(replica)
        self._free -= dead.free
        if dead.requests:
            self.busy_s[replica] += now - dead.busy_since
        for request_id, item in dead.requests.items():
            self.losses[request_id] = self.losses.get(request_id, 0) + 1
            queue = self._retries if self.losses[request_id] == 1 else self._quarantine
            queue.append((request_id, item))
        return list(dead.requests)

    @property
    def assignable(self) -> int:
        """The number of new requests that can be assigned now, a bounded number per replica.

        The bound spreads requests that arrive slowly evenly over the replicas.
        """
        return max(0, min(self._free, _MAX_ASSIGNED * len(self._available)) - len(self._retries))

    def assign(
        self, new: Sequence[tuple[int, Item]], last: bool, now: float
    ) -> dict[int, list[Item]]:
        """Assign new requests, as (id, request), and those of dead replicas: replica → requests.

        At most `assignable` requests may be new. last: whether these are the last new requests.
        Neighbours stay together in runs, because they may share a prefix. The runs of a replica
        are spread over the input, because neighbours may be equally long.
        """
        self.unfinished += len(new)
        waiting = deque(new)
        waiting.extendleft(reversed(self._retries))
        self._retries.clear()
        assigned: defaultdict[int, list[Item]] = defaultdict(list)
        if not waiting:
            if last and self._quarantine:
                self._assign_quarantined(assigned, now)
            return assigned
        self._assign_group(waiting, assigned, now)
        by_load = [(self._replicas[index].load, index) for index in self._available]
        heapq.heapify(by_load)
        run = max(1, len(waiting) // (_RUNS_PER_REPLICA * max(1, len(by_load))))
        while waiting and by_load:
            _, index = heapq.heappop(by_load)
            replica = self._replicas[index]
            count = min(run, replica.free, len(waiting))
            for _ in range(count):
                assigned[index].append(self._assign_one(index, waiting.popleft(), now))
            self._assign_group(waiting, assigned, now)
            if replica.free:
                heapq.heappush(by_load, (replica.load, index))
        self._retries.extend(waiting)  # more were lost than the other replicas can take
        return assigned

    def remove_finished(self, replica: int, request_ids: Iterable[int], now: float) -> list[Item]:
        """Remove finished requests from a replica, by id; return them."""
        state = self._replicas[replica]
        before = state.free
        items = [state.requests.pop(request_id) for request_id in request_ids]
        self._free += state.free - before
        self.unfinished -= len(items)
        if items:
            if state.free:
                self._available.add(replica)
            if not state.requests:
                self.busy_s[replica] += now - state.busy_since
        return items

    def find(self, request_id: int) -> tuple[int, Item] | None:
        """Return the replica that runs a request, and the request; None if none does."""
        for index, replica in self._replicas.items():
            if request_id in replica.requests:
                return index, replica.requests[request_id]
        return None

    def _assign_quarantined(self, assigned: dict[int, list[Item]], now: float) -> None:
        """Assign one quarantined request to each idle replica."""
        for index in sorted(self._available):
            if self._quarantine and not self._replicas[index].requests:
                assigned[index] = [self._assign_one(index, self._quarantine.popleft(), now)]

    def _assign_group(
        self,
        waiting: "deque[tuple[int, Item]]",
        assigned: "defaultdict[int, list[Item]]",
        now: float,
    ) -> None:
        """Assign those of the waiting requests that share the prompt of the last one."""
        index = self._group_replica
        replica = self._replicas.get(index)
        while (
            waiting
            and replica is not None
            and self._shares_prompt(waiting[0][1])
            and len(self._group) < _MAX_GROUP
            # Beyond its capacity, but not so far that other replicas run out of requests.
            and len(replica.requests) < replica.capacity + replica.capacity // 5
        ):
            assigned[index].append(self._assign_one(index, waiting.popleft(), now))

    def _shares_prompt(self, item: Item) -> bool:
        return bool(self._together and self._group and self._together(self._group[-1], item))

    def _assign_one(self, index: int, request: tuple[int, Item], now: float) -> Item:
        replica = self._replicas[index]
        if not replica.requests:
            replica.busy_since = now
        if index != self._group_replica or not self._shares_prompt(request[1]):
            self._group.clear()
        self._group.append(request[1])
        self._group_replica = index
        before = replica.free
        replica.requests[request[0]] = request[1]
        self._free -= before - replica.free
        if not replica.free:
            self._available.discard(index)
        return request[1]
