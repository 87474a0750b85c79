"""Ranks: processes that compute one model together, on torch.distributed (NCCL, RCCL, gloo).

Rank 0 is the process that has the engine: it schedules, samples what is drawn, and tells the
others what to do, a message a step. They run `rank.serve`: the same runner, on their share. Process
groups are made here and belong to nobody else, so that a process may have several engines.

    rank 0:  schedule → send the step → compute own share ⇄ exchange ⇄ → tokens
    others:             receive it    → compute own share ⇄ exchange ⇄
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.decode_graphs import Capture
from engine.errors import EngineError
from engine.memory_plan import is_out_of_memory
from engine.model_runner import ModelRunner
from engine.parallel.channel import (
    OUT_OF_MEMORY,
    PEER_LOST,
    Channel,
    described,
    is_connection,
    torchrun_size,
    torchrun_store,
)
from engine.parallel.step_message import StepMessage
from engine.request import SamplingParams
from engine.sampler import Sampled
from model import CheckpointError, ModelConfig
from model.sharding import Shard

_START_S = 120.0  # for a process to import torch on a busy machine
_DYING_S = 10.0  # from a broken connection to the end of the process that broke it


class Ranks:
    """Rank 0's hold on the others: started, told, watched and ended.

    Where `torchrun` has started this process and the others, these are they.
    """

    def __init__(self, size: int):
        self.size = size
        self.link: Channel | None = None
        self._store: Any = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watcher: threading.Thread | None = None
        self._closing = threading.Event()
        # Whether all ranks wait for a message. When an exception comes in between they do not,
        # and nothing can be told them any more.
        self._listening = False

    @property
    def shard(self) -> Shard:
        """Rank 0's; without connections until `start`."""
        return Shard(0, self.size) if self.link is None else self.link.shard

    @property
    def listening(self) -> bool:
        """Whether the others are there and wait for a message."""
        return self.link is not None and self._listening

    def start(self, device: torch.device) -> None:
        """Start the other ranks and connect to them. Raises EngineError."""
        if self.link is not None:
            return
        launched = torchrun_size() == self.size
        try:
            if not launched:
                self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
                for rank in range(1, self.size):
                    self._processes.append(_spawn(rank, self.size, self._store.port, device))
            else:
                self._store = torchrun_store()
                self._store.set("device", device.type)
            self._wait_for_all()
            self.link = Channel(0, self.size, self._store, device, one_host=not launched)
        except BaseException:
            self.close()
            raise
        self._listening = True
        if device.type == "cuda":
            self._closing.clear()
            self._watcher = threading.Thread(target=self._watch, args=(self.link,), daemon=True)
            self._watcher.start()

    def _wait_for_all(self) -> None:
        names = [f"here/{rank}" for rank in range(1, self.size)]
        end = time.monotonic() + _START_S
        while not self._store.check(names):
            if any(process.poll() is not None for process in self._processes):
                raise self._lost("did not start") or EngineError("a rank did not start")
            if time.monotonic() > end:
                raise EngineError(f"not all of {self.size} ranks came within {_START_S:.0f} s")
            time.sleep(0.02)

    def send_step(self, work: StepMessage) -> None:
        """Tell the others to compute this; every rank then must."""
        assert self.link is not None
        self.link.send_step(work)

    def call(self, name: str, args: tuple[Any, ...], own: Callable[[], Any]) -> Any:
        """Let every rank do what `rank.serve` knows by this name, and rank 0 `own`.

        Returns what `own` does. Raises what went wrong on any rank, its own first.
        """
        with self.together():
            assert self.link is not None
            self.link.send_call(name, args)
            result, error = None, None
            try:
                result = own()
            except Exception as caught:
                if is_out_of_memory(caught):
                    raise  # the others may be waiting for a result that will not come
                error = caught
            reports = self.link.reports("" if error is None else described(error))
        if error is not None:
            raise error
        for rank, report in enumerate(reports):
            if report:
                kind, _, text = report.partition("\n")
                error_type = {"CheckpointError": CheckpointError, "EngineError": EngineError}
                raise error_type.get(kind, RuntimeError)(f"rank {rank}: {text}")
        return result

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What all ranks do at once: an error in it is the end of them all. Raises EngineError."""
        self._listening = False
        try:
            yield
        except Exception as error:
            lost = self._lost("died") if is_connection(error) else None
            self.close()
            if lost is not None:
                raise lost from error
            if is_out_of_memory(error):
                raise EngineError(
                    f"out of memory in what {self.size} ranks do together, which cannot be taken"
                    f" back; {OUT_OF_MEMORY}"
                ) from error
            raise
        self._listening = True

    def close(self) -> None:
        """End the other ranks: as told if they listen, else at once."""
        link, listening, self.link = self.link, self.listening, None
        if self._watcher is not None:  # at the end of the program it must not be inside torch
            self._closing.set()
            self._watcher.join(_DYING_S)
            self._watcher = None
        if link is not None and listening:
            with contextlib.suppress(RuntimeError):
                link.send_call("end", ())
                link.reports("")
        else:
            for process in self._processes:
                process.kill()
        for process in self._processes:
            try:
                process.wait(_DYING_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
        self._processes = []

    def _lost(self, what: str) -> EngineError | None:
        """Which rank broke the connection, and why; None if all are well."""
        end = time.monotonic() + (_DYING_S if self._processes else 0)
        while (found := self._first_dead()) is None and time.monotonic() < end:
            time.sleep(0.05)
        if found is not None:
            return EngineError(f"rank {found[0]} of {self.size} {what}: {found[1]}")
        if self._processes:
            return None
        return EngineError(f"one of {self.size} ranks {what}; torchrun says which")

    def _first_dead(self) -> tuple[int, str] | None:
        """The rank that is the cause: others end only because they lost it."""
        for rank in range(1, self.size):
            key = f"error/{rank}"
            if self._store.check([key]):
                return rank, self._store.get(key).decode()
            status = self._processes[rank - 1].poll() if self._processes else None
            if status is None or status == PEER_LOST:
                continue
            if status < 0:
                return rank, f"killed by signal {-status} ({signal.Signals(-status).name})"
            return rank, f"it ended with status {status}"
        return None

    def _watch(self, link: Channel) -> None:
        """Break off what a GPU waits for when a rank has died: it would wait for ever."""
        with contextlib.suppress(RuntimeError):  # of a store or a device that is gone
            while not self._closing.wait(0.2):
                if self._first_dead() is not None:
                    link.abort()
                    return


class CoordinatorRunner(ModelRunner):
    """Rank 0's runner: whatever it does, the others do with it."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, ranks: Ranks):
        super().__init__(config, device, dtype, ranks.shard)
        self._ranks = ranks

    def connect(self, checkpoint: Path, threads: int) -> None:
        """Give each rank a runner of its own share; threads: of each, on a CPU."""
        self._ranks.start(self.device)
        self.shard = self._ranks.shard
        dtype = str(self.dtype).removeprefix("torch.")
        self._ranks.call("make", (str(checkpoint), dtype, threads), lambda: None)

    def load(self, checkpoint: Path, dummy: bool) -> None:
        """As ModelRunner.load, on every rank."""
        self._on_all("load", checkpoint, dummy)

    def available(self) -> int:
        """Bytes that every rank can still allocate."""
        link = self._ranks.link
        assert link is not None
        return int(self._ranks.call("available", (), link.available))

    def allocate(self, *sizes: int) -> None:
        """As ModelRunner.allocate, on every rank."""
        self._on_all("allocate", *sizes)

    def rehearse(self, *sizes: int) -> None:
        """As ModelRunner.rehearse, on every rank."""
        super().rehearse(*sizes)  # which allocates and computes on all of them
        self._on_all("deallocate")

    def capture(self, capture: Capture, ahead_of_time: bool = True) -> None:
        """As ModelRunner.capture, on every rank, or on none if one cannot.

        Whether all can is asked first: to capture is to exchange, and a rank that cannot do so
        would be waited for.
        """
        self._ranks.call("prepare_capture", (), lambda: None)
        own = ModelRunner.capture
        try:
            self._ranks.call("capture", (ahead_of_time,), lambda: own(self, capture, ahead_of_time))
        except Exception:
            if self._ranks.link is not None:
                self._on_all("uncapture")
            raise

    def compute(self, work: StepMessage, special: Mapping[int, SamplingParams]) -> Sampled:
        """As ModelRunner.compute, on every rank."""
        with self._ranks.together():
            self._ranks.send_step(work)
            return super().compute(work, special)

    def free(self) -> None:
        """As ModelRunner.free, on every rank that is left; those that do not listen end."""
        if self._ranks.listening:
            self._on_all("free")
        else:
            super().free()
            self._ranks.close()

    def _on_all(self, name: str, *args: Any) -> None:
        own = getattr(ModelRunner, name)
        self._ranks.call(name, args, lambda: own(self, *args))


def _spawn(rank: int, size: int, port: int, device: torch.device) -> "subprocess.Popen[bytes]":
    """Start a rank's process; the end of its standard input is the end of ours."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [
        sys.executable,
        "-m",
        "engine.parallel.worker",
        *map(str, (rank, size, port, device.type)),
    ]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
