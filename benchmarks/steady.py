"""Time decoding beside other processes: `python benchmarks/steady.py CHECKPOINT`.

Each load is other work on the same cores, of equal or of lowest priority, always there or starting
and stopping at random; or a core is taken away for 50 ms at random. One stream is decoded `--runs`
times by this engine while the other work is paused, by this engine beside it, and by each `--peer`
beside it, in turn. Prints the worst and the median of the runs in tokens a second, and the worst as
a part of the fair share: that of the cores that the scheduler owes this engine's threads during the
run, times the engine's median while the other work is paused. The last line is one JSON object.

A peer is a name and a shell command, which decodes once for each line of its input and prints a
line whose last number is the tokens a second:

    python benchmarks/steady.py DIR --peer llama.cpp \
        "while read _; do llama-bench -m FILE -p 0 -n 64 -r 1 -o json | grep avg_ts; done"
"""

import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: F401, I001  before torch: sets how OpenMP threads wait

import click
import torch
from rich.console import Console
from rich.table import Table

from engine import Engine, EngineConfig, Request, SamplingParams

_COUNT = "while True: pass"
# A product that is bound by memory: each matrix is read once for four columns.
_MATRIX = """
import torch
torch.set_num_threads(2)
a, b = torch.rand(8192, 4096), torch.rand(4096, 4)
while True: a @ b
"""
# Takes a core for 50 ms, every 200 to 400 ms: as a real-time process if that is permitted.
_TAKE_CORE = """
import os, random, time
try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
except OSError:
    os.nice(-20)
cpus = sorted(os.sched_getaffinity(0))
while True:
    time.sleep(random.uniform(0.15, 0.35))
    os.sched_setaffinity(0, {random.choice(cpus)})
    end = time.perf_counter() + 0.05
    while time.perf_counter() < end: pass
"""
_CYCLE_S = 0.3  # of _TAKE_CORE on average, of which it runs for 0.05
_WEIGHT = {0: 1024, 19: 15}  # of a thread by its nice value: Linux's sched_prio_to_weight


@dataclass(frozen=True)
class Load:
    """Other work: a number of processes of one kind."""

    code: str
    processes: int
    threads: int = 1  # of each process
    nice: int = 0
    is_random: bool = False  # starts and stops at random, half of the time each

    def fair_share(self, threads: int, part: float) -> float:
        """The part of the cores for an engine of `threads` threads, as many as there are cores.

        part: of the time, in which the processes were not stopped.
        """
        if self.code == _TAKE_CORE:
            return 1 - 0.05 / _CYCLE_S / threads
        own = threads * _WEIGHT[0]
        others = self.processes * self.threads * _WEIGHT[self.nice]
        return 1 - part * others / (own + others)


LOADS = {
    "1 process": Load(_COUNT, 1),
    "2 processes": Load(_COUNT, 2),
    "4 processes": Load(_COUNT, 4),
    "2 of lowest priority": Load(_COUNT, 2, nice=19),
    "4 of lowest priority": Load(_COUNT, 4, nice=19),
    "matrix product": Load(_MATRIX, 1, threads=2),
    "matrix product of lowest priority": Load(_MATRIX, 1, threads=2, nice=19),
    "2 at random": Load(_COUNT, 2, is_random=True),
    "matrix product at random": Load(_MATRIX, 1, threads=2, is_random=True),
    "core away": Load(_TAKE_CORE, 1),
}


class Peer:
    """Another engine, as a process that decodes once for each line that it reads."""

    def __init__(self, name: str, command: str):
        self.name = name
        self._process = subprocess.Popen(
            command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.run()  # until it has started

    def run(self) -> float:
        """Decode once: tokens a second. Raises click.ClickException if it prints no number."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        line = process.stdout.readline()
        numbers = re.findall(r"\d+(?:\.\d+)?", line)
        if not numbers:
            raise click.ClickException(f"{self.name} printed {line!r} instead of a number")
        return float(numbers[-1])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


class Others:
    """The processes of a load, which run while they are not paused."""

    def __init__(self, load: Load):
        self._load = load
        self._lock = threading.Lock()
        self._is_running, self._ran_s, self._since = True, 0.0, time.perf_counter()
        self._stopped = threading.Event()
        command = [sys.executable, "-c", load.code]
        self._processes = [
            subprocess.Popen(command, preexec_fn=lambda: os.nice(load.nice) and None)
            for _ in range(load.processes)
        ]
        self._switch = threading.Thread(target=self._start_and_stop)
        time.sleep(4 if load.code == _MATRIX else 0.2)  # until they have started
        if load.is_random:
            self._switch.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the processes for a while."""
        with self._lock:  # a load at random waits until the pause is over
            self._run(False)
            yield
            self._run(True)

    def ran_s(self) -> float:
        """Return for how many seconds the processes were not stopped."""
        with self._lock:
            return self._ran_s + self._is_running * (time.perf_counter() - self._since)

    def close(self) -> None:
        """End the processes."""
        self._stopped.set()
        if self._load.is_random:
            self._switch.join()
        for process in self._processes:
            process.kill()
            process.wait()

    def _start_and_stop(self) -> None:
        rng, runs = random.Random(0), True
        while not self._stopped.wait(rng.uniform(0.02, 0.3)):
            runs = not runs
            with self._lock:
                self._run(runs)

    def _run(self, runs: bool) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGCONT if runs else signal.SIGSTOP)
        now = time.perf_counter()
        self._ran_s += self._is_running * (now - self._since)
        self._is_running, self._since = runs, now


@dataclass
class Runs:
    """The speeds beside a load, in tokens a second."""

    alone: list[float] = field(default_factory=list)  # of this engine while the load is paused
    beside: list[float] = field(default_factory=list)  # of this engine beside the load
    shares: list[float] = field(default_factory=list)  # of the cores, its fair ones in these runs
    peers: dict[str, list[float]] = field(default_factory=dict)  # beside the load, by name

    def of_fair_shares(self) -> list[float]:
        """Return the speeds as parts of those that the fair shares of the cores allow."""
        quiet = statistics.median(self.alone)
        return [v / (share * quiet) for v, share in zip(self.beside, self.shares, strict=True)]


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False))
@click.option("--runs", default=20, show_default=True, help="Runs of each engine beside a load.")
@click.option("--tokens", default=128, show_default=True, help="Output tokens of a run.")
@click.option("--load", "names", multiple=True, type=click.Choice(list(LOADS)), help="Only these.")
@click.option("--peer", "peers", multiple=True, nargs=2, metavar="NAME COMMAND")
def main(
    checkpoint: str, runs: int, tokens: int, names: tuple[str, ...], peers: list[tuple[str, str]]
) -> None:
    """Print how fast one stream is decoded beside other processes."""
    results: dict[str, Runs] = {}
    config = EngineConfig(prefix_cache=False, speculation=False, max_batch_size=4)
    request = Request(list(range(100, 116)), SamplingParams(max_new_tokens=tokens, ignore_eos=True))
    others = [Peer(*peer) for peer in peers]
    with Engine(checkpoint, config) as engine:

        def decode() -> float:
            start = time.perf_counter()
            list(engine.generate([request]))
            return time.perf_counter() - start

        decode()  # records the steps
        threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
        if threads != cores:
            raise click.ClickException(
                f"the engine has {threads} threads for {cores} cores: fair shares are not known"
            )
        for name in names or LOADS:
            found = results[name] = Runs(peers={peer.name: [] for peer in others})
            load = Others(LOADS[name])
            try:
                for _ in range(runs):
                    with load.paused():
                        found.alone.append(tokens / decode())
                    before = load.ran_s()
                    seconds = decode()
                    part = (load.ran_s() - before) / seconds
                    found.beside.append(tokens / seconds)
                    found.shares.append(LOADS[name].fair_share(threads, part))
                    for peer in others:
                        found.peers[peer.name].append(peer.run())
            finally:
                load.close()
    for peer in others:
        peer.close()
    report(results)


def report(results: Mapping[str, Runs]) -> None:
    """Print the table, then the JSON line."""
    table = Table("load", "fair share", "engine", "worst", "median", "worst of fair share")
    for name, runs in results.items():
        share = f"{statistics.median(runs.shares):.2f}"
        alone = f"{min(runs.alone) / statistics.median(runs.alone):.2f}"
        for engine, speeds, worst in (
            ("getp, load paused", runs.alone, alone),
            ("getp", runs.beside, f"{min(runs.of_fair_shares()):.2f}"),
            *((peer, values, "") for peer, values in runs.peers.items()),
        ):
            median = f"{statistics.median(speeds):.1f}"
            table.add_row(name, share, engine, f"{min(speeds):.1f}", median, worst)
    Console().print(table)
    print(json.dumps({name: asdict(runs) for name, runs in results.items()}))


if __name__ == "__main__":
    main()
