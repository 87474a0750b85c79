"""Time decoding beside other processes: `python benchmarks/steady.py CHECKPOINT`.

Each load is other work on the same cores, of equal or of lowest priority, always there or starting
and stopping at random; or a core is taken away for 50 ms at random. One stream is decoded `--runs`
times beside each load, by this engine and by each `--peer`, in turn. Prints the worst and the
median of the runs in tokens a second, and the worst as a part of the fair share: that of the cores
that the scheduler owes this engine's threads, times the engine's median without other work. The
last line is one JSON object.

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
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: F401, I001  before torch: sets how OpenMP threads wait

import click
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

    code: str = ""
    processes: int = 0
    threads: int = 1  # of each process
    nice: int = 0
    is_random: bool = False  # starts and stops at random, half of the time each

    def fair_share(self, threads: int) -> float:
        """The part of the cores for an engine of `threads` threads, as many as there are cores."""
        if self.code == _TAKE_CORE:
            return 1 - 0.05 / _CYCLE_S / threads
        others = self.processes * self.threads * _WEIGHT[self.nice]
        share = threads * _WEIGHT[0] / (threads * _WEIGHT[0] + others)
        return (1 + share) / 2 if self.is_random else share


LOADS = {
    "none": Load(),
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


@contextlib.contextmanager
def running(load: Load) -> Iterator[None]:
    """Run the processes of a load."""
    command = [sys.executable, "-c", load.code]
    processes = [
        subprocess.Popen(command, preexec_fn=lambda: os.nice(load.nice) and None)
        for _ in range(load.processes)
    ]
    stopped = threading.Event()
    switch = threading.Thread(target=_switch, args=(processes, stopped))
    if processes:
        time.sleep(4 if load.code == _MATRIX else 0.2)  # until they have started
    if load.is_random:
        switch.start()
    try:
        yield
    finally:
        stopped.set()
        if load.is_random:
            switch.join()
        for process in processes:
            process.kill()
            process.wait()


def _switch(processes: list[subprocess.Popen[bytes]], stopped: threading.Event) -> None:
    """Stop and continue the processes at random."""
    rng, runs = random.Random(0), True
    while not stopped.wait(rng.uniform(0.02, 0.3)):
        runs = not runs
        for process in processes:
            process.send_signal(signal.SIGCONT if runs else signal.SIGSTOP)


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
    results: dict[str, dict[str, list[float]]] = {}
    chosen = list(dict.fromkeys(("none", *(names or LOADS))))
    config = EngineConfig(prefix_cache=False, speculation=False, max_batch_size=4)
    request = Request(list(range(100, 116)), SamplingParams(max_new_tokens=tokens, ignore_eos=True))
    others = [Peer(*peer) for peer in peers]
    with Engine(checkpoint, config) as engine:
        list(engine.generate([request]))  # records the steps
        for name in chosen:
            speeds: dict[str, list[float]] = defaultdict(list)
            with running(LOADS[name]):
                for _ in range(runs):
                    start = time.perf_counter()
                    list(engine.generate([request]))
                    speeds["getp"].append(tokens / (time.perf_counter() - start))
                    for peer in others:
                        speeds[peer.name].append(peer.run())
            results[name] = speeds
    for peer in others:
        peer.close()
    report(results, os.cpu_count() or 1)


def report(results: dict[str, dict[str, list[float]]], threads: int) -> None:
    """Print the table, then the JSON line."""
    table = Table("load", "fair share", "engine", "worst", "median", "worst of fair share")
    figures = []
    for name, speeds in results.items():
        share = LOADS[name].fair_share(threads)
        for engine, values in speeds.items():
            quiet = statistics.median(results["none"][engine])
            worst, median = min(values), statistics.median(values)
            table.add_row(
                name, f"{share:.2f}", engine, f"{worst:.1f}", f"{median:.1f}",
                f"{worst / (share * quiet):.2f}",
            )  # fmt: skip
            figures.append(
                {"load": name, "engine": engine, "fair_share": round(share, 3)}
                | {"tok_s": [round(value, 1) for value in values]}
            )
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
