"""WorkerPool: the worker processes of rank 0.

The process groups are private, so that one process can have several engines. Collectives use NCCL,
RCCL or gloo.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import EngineError
from engine.memory_plan import is_out_of_memory
from engine.parallel.channel import (
    OUT_OF_MEMORY_REMEDY,
    PEER_LOST,
    Channel,
    error_report,
    is_connection_error,
    torchrun_size,
    torchrun_store,
)
from engine.parallel.step_message import StepMessage
from model import CheckpointError
from model.sharding import Shard

_START_TIMEOUT_S = 120.0  # importing torch can take this long on a busy machine
_EXIT_TIMEOUT_S = 10.0  # from a broken connection to the exit of the process at its other end


class WorkerPool:
    """Starts, calls, monitors and ends the other ranks, on behalf of rank 0.

    If torchrun started this process, the other processes that it started are the workers.
    """

    def __init__(self, size: int):
        """size: the number of ranks, rank 0 included."""
        self.size = size
        self.channel: Channel | None = None
        self.processes: list[subprocess.Popen[bytes]] = []  # by rank - 1; empty with torchrun
        self._store: Any = None
        self._watcher: threading.Thread | None = None
        self._closing = threading.Event()
        # Whether all workers wait for a message. After an exception in the middle of an exchange
        # they may not, and can no longer be called.
        self._waiting = False

    @property
    def shard(self) -> Shard:
        """Rank 0's shard; without connections until `start`."""
        return Shard(0, self.size) if self.channel is None else self.channel.shard

    @property
    def ready(self) -> bool:
        """Whether the workers run and wait for a message."""
        return self.channel is not None and self._waiting

    def start(self, device: torch.device) -> None:
        """Start the workers and connect to them. Raises EngineError."""
        if self.channel is not None:
            return
        by_torchrun = torchrun_size() == self.size
        try:
            if not by_torchrun:
                self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
                for rank in range(1, self.size):
                    self.processes.append(_spawn(rank, self.size, self._store.port, device))
            else:
                self._store = torchrun_store()
                self._store.set("device", device.type)
            self._wait_for_all()
            self.attach(Channel(0, self.size, self._store, device, one_host=not by_torchrun))
        except BaseException:
            self.close()
            raise
        if device.type == "cuda":
            self.watch()

    def attach(self, channel: Channel) -> None:
        """Use this channel; the ranks at its other ends must wait for messages."""
        self.channel, self._waiting = channel, True

    def watch(self) -> None:
        """Abort collectives when a worker dies: a GPU would wait for it forever."""
        self._closing.clear()
        self._watcher = threading.Thread(target=self._watch, args=(self.channel,), daemon=True)
        self._watcher.start()

    def _wait_for_all(self) -> None:
        names = [f"here/{rank}" for rank in range(1, self.size)]
        end = time.monotonic() + _START_TIMEOUT_S
        while not self._store.check(names):
            if any(process.poll() is not None for process in self.processes):
                raise self._find_lost("did not start") or EngineError("a rank did not start")
            if time.monotonic() > end:
                raise EngineError(
                    "not all of {size} ranks started within {seconds} s",
                    size=self.size,
                    seconds=round(_START_TIMEOUT_S),
                )
            time.sleep(0.02)

    def send_step(self, message: StepMessage) -> None:
        """Send a step to the workers; rank 0 must then compute it, too."""
        assert self.channel is not None
        self.channel.send_step(message)

    def call(self, name: str, args: tuple[Any, ...], local: Callable[[], Any]) -> Any:
        """Run a call of `worker.run` on every worker and `local` on rank 0; returns its result.

        Raises rank 0's error if it has one, else the first worker's.
        """
        with self.collective():
            assert self.channel is not None
            self.channel.send_call(name, args)
            result, error = None, None
            try:
                result = local()
            except Exception as caught:
                if is_out_of_memory(caught):
                    raise  # the workers may wait for a collective that will not happen
                error = caught
            reports = self.channel.gather_reports("" if error is None else error_report(error))
        if error is not None:
            raise error
        for rank, report in enumerate(reports):
            if report:
                raise _reported_error(rank, report)
        return result

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Context of work by all ranks at once: an error ends all of them. Raises EngineError."""
        self._waiting = False
        try:
            yield
        except Exception as error:
            lost = self._find_lost("died") if is_connection_error(error) else None
            self.close()
            if lost is not None:
                raise lost from error
            if is_out_of_memory(error):
                raise EngineError(
                    "out of memory in a step that {size} ranks compute together and that cannot be "
                    "repeated in parts; " + OUT_OF_MEMORY_REMEDY,
                    size=self.size,
                ) from error
            raise
        self._waiting = True

    def close(self) -> None:
        """End the workers: with a message if they wait for one, else by killing them."""
        channel, ready, self.channel = self.channel, self.ready, None
        if self._watcher is not None:  # it must not be inside torch when the program exits
            self._closing.set()
            self._watcher.join(_EXIT_TIMEOUT_S)
            self._watcher = None
        if channel is not None and ready:
            with contextlib.suppress(RuntimeError):
                channel.send_call("end", ())
                channel.gather_reports("")
        else:
            for process in self.processes:
                process.kill()
        for process in self.processes:
            try:
                process.wait(_EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
        self.processes = []

    def _find_lost(self, event: str) -> EngineError | None:
        """The error that names the rank that broke the connection; None if all ranks are alive."""
        end = time.monotonic() + (_EXIT_TIMEOUT_S if self.processes else 0)
        while (found := self._first_dead()) is None and time.monotonic() < end:
            time.sleep(0.05)
        if found is not None:
            rank, cause = found
            return EngineError(
                "rank {rank} of {size} " + event + ": {cause}",
                rank=rank,
                size=self.size,
                cause=cause,
            )
        if self.processes:
            return None
        return EngineError(
            "one of {size} ranks " + event + "; see the output of torchrun", size=self.size
        )

    def _first_dead(self) -> tuple[int, EngineError] | None:
        """The rank that failed, and why; ranks that only lost their connection do not count."""
        for rank in range(1, self.size):
            key = f"error/{rank}"
            if self._store.check([key]):
                return rank, EngineError(self._store.get(key).decode())
            status = self.processes[rank - 1].poll() if self.processes else None
            if status is None or status == PEER_LOST:
                continue
            if status < 0:
                name = signal.Signals(-status).name
                return rank, EngineError(f"killed by signal {-status} ({name})")
            return rank, EngineError(f"it exited with status {status}")
        return None

    def _watch(self, channel: Channel) -> None:
        with contextlib.suppress(RuntimeError):  # the store or the device is gone
            while not self._closing.wait(0.2):
                if self._first_dead() is not None:
                    channel.abort()
                    return


def _reported_error(rank: int, report: str) -> Exception:
    """The error that a worker reported (`channel.error_report`)."""
    kind, _, text = report.partition("\n")
    if kind == "EngineError":
        return EngineError("rank {rank}: {cause}", rank=rank, cause=EngineError(text))
    error = CheckpointError if kind == "CheckpointError" else RuntimeError
    return error(f"rank {rank}: {text}")


def _spawn(rank: int, size: int, port: int, device: torch.device) -> "subprocess.Popen[bytes]":
    """Start a worker, which exits when its standard input closes, at the latest with rank 0."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    arguments = map(str, (rank, size, port, device.type))
    return subprocess.Popen(
        [sys.executable, "-m", "engine.parallel.worker", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
