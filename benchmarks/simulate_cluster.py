"""Simulate jobs on 1 to 1,024 replicas: `python -m benchmarks.simulate_cluster`.

The real dispatcher (getp/cluster/dispatcher.py) assigns the requests. Engines are simulated: a step
takes the time that the cost model predicts for the model on the GPU at that batch, divided by the
assumed efficiency, or the measured time given with `--step-ms`. The driver takes the time that
benchmarks/cluster.py measures. Output lengths are lognormal: a few are many times the median.

Prints a table. Efficiency: time at full batches on every replica over the time taken. Tail: time
from 99% of the requests done to the end. Re-run: requests of dead replicas, run again on others.
Busy: share of the time in which replicas had requests. Driver: share of the time in which the
driver worked.
"""

import argparse
import heapq
import itertools
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from getp.cluster.dispatcher import Dispatcher, collect_delay_s, max_in_flight
from model.cost.devices import find_device
from model.cost.known_models import named_config
from model.cost.operations import operations, total
from model.cost.roofline import bound
from model.cost.workload import Workload

_TRIP_S = 0.001  # latency of a message in one direction, including the actor call


@dataclass(frozen=True)
class Request:
    """Lengths in tokens."""

    number: int
    prompt: int
    output: int


@dataclass(frozen=True)
class Speed:
    """The speed of an engine, in seconds."""

    step_s: Callable[[int], float]  # by batch size
    prefill_s: float  # per token
    batch: int


@dataclass
class Replica:
    """An engine: its batch advances step by step; requests are prefilled one by one."""

    index: int
    slowness: float
    generation: int = 0
    alive: bool = True
    at: float = 0.0  # time up to which it is simulated
    steps: float = 0.0  # completed by then
    version: int = 0  # of its next scheduled end; events of earlier versions are ignored
    running: list[tuple[float, int, Request]] = field(default_factory=list)  # heap by last step
    waiting: deque[Request] = field(default_factory=deque)
    finished: list[Request] = field(default_factory=list)
    collecting: bool = True  # a call from the driver waits for results

    def advance(self, now: float, speed: Speed) -> None:
        """Simulate up to `now`."""
        if self.running and now > self.at:
            step = speed.step_s(len(self.running)) * self.slowness
            self.steps += (now - self.at) / step
        self.at = max(self.at, now)

    def admit(self, speed: Speed) -> None:
        """Fill the batch; each prefill delays the whole batch."""
        while self.waiting and len(self.running) < speed.batch:
            request = self.waiting.popleft()
            self.at += speed.prefill_s * request.prompt * self.slowness
            last = self.steps + request.output
            heapq.heappush(self.running, (last, request.number, request))

    def next_end(self, speed: Speed) -> float:
        """Return when the next request finishes."""
        step = speed.step_s(len(self.running)) * self.slowness
        return self.at + max(0.0, self.running[0][0] - self.steps) * step


@dataclass
class Outcome:
    """The figures of a simulated job."""

    seconds: float = 0.0
    tokens: int = 0
    ideal_s: float = 0.0
    tail_s: float = 0.0
    rerun: int = 0
    busy: float = 0.0
    driver: float = 0.0  # share of the time in which the driver worked


class Simulation:
    """One job. An event is (time, order, function, arguments)."""

    def __init__(
        self,
        speed: Speed,
        requests: Iterator[Request],
        slowness: list[float],
        driver_s: tuple[float, float],
    ) -> None:
        self.speed = speed
        self.replicas = [Replica(index, slow) for index, slow in enumerate(slowness)]
        self.dispatcher: Dispatcher[Request] = Dispatcher()
        self.source = requests
        self.more = True
        self.driver_free = 0.0
        self.driver_busy = 0.0
        self._message_s, self._request_s = driver_s
        self.ends: list[float] = []
        self.outcome = Outcome()
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = itertools.count()
        self._delay = collect_delay_s(len(slowness))

    def run(self, deaths: list[tuple[float, int]], restart_s: float) -> Outcome:
        """Run the job; `deaths`: (time, replica)."""
        for replica in self.replicas:
            self.dispatcher.add(replica.index, max_in_flight(self.speed.batch))
        for when, index in deaths:
            self._at(when, self._die, self.replicas[index], restart_s)
        self._assign(0.0)
        while self.more or self.dispatcher.unfinished:
            now, _, act, arguments = heapq.heappop(self._events)
            act(now, *arguments)
        found, ends = self.outcome, sorted(self.ends)
        found.seconds = ends[-1]
        found.tail_s = ends[-1] - ends[math.ceil(0.99 * len(ends)) - 1]
        found.busy = sum(self.dispatcher.busy_s.values()) / len(self.replicas) / found.seconds
        found.driver = self.driver_busy / max(found.seconds, self.driver_free)
        return found

    def _at(self, when: float, act: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (when, next(self._order), act, arguments))

    def _drive(self, now: float, requests: int) -> float:
        """Charge the driver for a message; return the time when it has handled it."""
        takes = self._message_s + self._request_s * requests
        self.driver_free = max(now, self.driver_free) + takes
        self.driver_busy += takes
        return self.driver_free

    def _assign(self, now: float) -> None:
        while True:
            wanted = self.dispatcher.assignable if self.more else 0
            new = list(itertools.islice(self.source, wanted))
            self.more = self.more and len(new) == wanted
            assigned = self.dispatcher.assign([(r.number, r) for r in new], not self.more, now)
            for index, items in assigned.items():
                replica = self.replicas[index]
                sent = self._drive(now, len(items))
                self._at(sent + _TRIP_S, self._arrive, replica, replica.generation, items)
            if not (assigned and self.more and self.dispatcher.assignable):
                return

    def _arrive(self, now: float, replica: Replica, generation: int, items: list[Request]) -> None:
        if generation != replica.generation:
            return
        replica.advance(now, self.speed)
        replica.waiting.extend(items)
        self._schedule_end(replica)

    def _schedule_end(self, replica: Replica) -> None:
        replica.admit(self.speed)
        replica.version += 1
        if replica.running:
            self._at(replica.next_end(self.speed), self._end, replica, replica.version)

    def _end(self, now: float, replica: Replica, version: int) -> None:
        if version != replica.version:
            return
        replica.advance(now, self.speed)
        replica.steps = max(replica.steps, replica.running[0][0])  # against rounding
        while replica.running and replica.running[0][0] <= replica.steps + 1e-9:
            replica.finished.append(heapq.heappop(replica.running)[2])
        if replica.collecting:
            replica.collecting = False
            self._at(now + self._delay, self._send, replica, replica.generation)
        self._schedule_end(replica)

    def _send(self, now: float, replica: Replica, generation: int) -> None:
        if generation == replica.generation:
            results, replica.finished = replica.finished, []
            self._at(now + _TRIP_S, self._queue, replica, generation, results)

    def _queue(self, now: float, replica: Replica, generation: int, results: list[Request]) -> None:
        """Results have arrived; they wait until the driver is free."""
        done = self._drive(now, 0)
        self._at(done, self._take, replica, generation, results)

    def _take(self, now: float, replica: Replica, generation: int, results: list[Request]) -> None:
        if generation != replica.generation:
            return
        self.dispatcher.remove_finished(replica.index, [each.number for each in results], now)
        self.ends.extend([now] * len(results))
        self.outcome.tokens += sum(each.output for each in results)
        self._at(now + _TRIP_S, self._collect, replica, generation)
        self._assign(now)

    def _collect(self, now: float, replica: Replica, generation: int) -> None:
        if generation != replica.generation:
            return
        if replica.finished:
            self._at(now + self._delay, self._send, replica, generation)
        else:
            replica.collecting = True

    def _die(self, now: float, replica: Replica, restart_s: float) -> None:
        if not replica.alive:
            return
        self.outcome.rerun += len(self.dispatcher.remove(replica.index, now))
        replica.alive = False
        replica.generation += 1
        replica.version += 1
        replica.running, replica.finished = [], []
        replica.waiting.clear()
        self._at(now + restart_s, self._start, replica)
        self._assign(now)

    def _start(self, now: float, replica: Replica) -> None:
        replica.alive, replica.collecting, replica.at = True, True, now
        self.dispatcher.add(replica.index, max_in_flight(self.speed.batch))
        self._assign(now)


def speed_of(model: str, gpu: str, batch: int, context: int, efficiency: float) -> Speed:
    """Return the speed that the cost model predicts for a model on a GPU at a mean context."""
    config, device = named_config(model), find_device(gpu)

    def seconds(work: Workload) -> float:
        found = bound(total(operations(config, work)), device, "bfloat16", work.tokens)
        return max(max(found.compute_s, found.memory_s) / efficiency, found.launch_s)

    steps = [0.0]
    for size in range(1, batch + 1):
        steps.append(seconds(Workload("decode", size, 1, context, "bfloat16", fused=True)))
    prefill = seconds(Workload("prefill", 8, 1024, 1024, "bfloat16", fused=True, causal=True))
    return Speed(lambda size: steps[size], prefill / 8192, batch)


def simulate(
    speed: Speed,
    count: int,
    each: int,
    slow: float,
    deaths_each: float,
    driver_s: tuple[float, float],
    seed: int,
) -> Outcome:
    """Simulate a job of `each` requests per replica. slow: share of replicas at half speed."""
    rng = random.Random(seed)
    requests = [
        Request(n, 128, min(4096, max(1, round(rng.lognormvariate(5.2, 1.0)))))
        for n in range(count * each)
    ]
    slowness = [2.0 if index < slow * count else 1.0 for index in range(count)]
    power = sum(1 / each for each in slowness)
    work = sum(r.output for r in requests) * speed.step_s(speed.batch) / speed.batch
    work += sum(r.prompt for r in requests) * speed.prefill_s
    simulation = Simulation(speed, iter(requests), slowness, driver_s)
    simulation.outcome.ideal_s = work / power
    number = math.ceil(deaths_each * count)
    deaths = [(rng.uniform(0, work / power), rng.randrange(count)) for _ in range(number)]
    found = simulation.run(deaths, restart_s=60.0)
    assert found.tokens == sum(r.output for r in requests)
    assert len(simulation.ends) == len(requests)
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt-oss-20b")
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--efficiency", type=float, default=0.7)
    parser.add_argument("--step-ms", type=float, nargs=2, metavar=("BASE", "EACH"),
                        help="measured time of a step, and of each request in it")  # fmt: skip
    parser.add_argument("--requests", type=int, default=2000, help="per replica")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4, 16, 64, 128, 256, 1024])
    parser.add_argument("--driver-us", type=float, nargs=2, default=[300.0, 60.0],
                        metavar=("MESSAGE", "REQUEST"))  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.step_ms is None:
        speed = speed_of(options.model, options.gpu, options.batch, 400, options.efficiency)
    else:
        base, each = options.step_ms
        speed = Speed(lambda size: (base + each * size) * 1e-3, each * 1e-3, options.batch)
    driver_s = options.driver_us[0] * 1e-6, options.driver_us[1] * 1e-6
    table = Table("replicas", "case", "tok/s", "efficiency", "time", "tail", "re-run", "busy",
                  "driver")  # fmt: skip
    cases = {"even": (0.0, 0.0), "1/10 slow": (0.1, 0.0), "1/10 die": (0.0, 0.1)}
    for count in options.replicas:
        for name, (slow, deaths) in cases.items() if count > 1 else [("even", (0.0, 0.0))]:
            found = simulate(speed, count, options.requests, slow, deaths, driver_s, options.seed)
            table.add_row(
                f"{count:,}",
                name,
                f"{found.tokens / found.seconds:,.0f}",
                f"{found.ideal_s / found.seconds:.1%}",
                f"{found.seconds:.1f} s",
                f"{found.tail_s:.1f} s",
                f"{found.rerun:,}",
                f"{found.busy:.1%}",
                f"{found.driver:.1%}",
            )
    step = speed.step_s(speed.batch) * 1e3
    console = Console(width=100)
    console.print(f"step of {speed.batch} requests: {step:.2f} ms; driver: {options.driver_us} µs")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
