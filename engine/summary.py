"""The summary of a finished run, by one engine or by many replicas, as reports need it."""

import contextlib
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.stats import EngineStats
from model import ModelConfig


@dataclass(frozen=True)
class ReplicaSummary:
    """One replica's part of a run, over all of its processes if it was restarted."""

    replica: int  # counted from 0
    host: str | None  # None: the replica never started
    requests: int  # finished here
    output_tokens: int
    output_tok_s: float
    busy: float  # share of the inference time in which it had requests
    mean_batch: float  # sequences in a step
    deaths: int  # processes that ended unexpectedly
    requests_left_to_others: int  # unfinished requests of its dead processes, run by other replicas
    peak_memory_bytes: int


@dataclass(frozen=True)
class RunSummary:
    """The devices, the settings and the counters of a run. Memory is in bytes."""

    device: str  # for display: a GPU's name, "cpu", or a phrase that describes the replicas
    device_type: Literal["cpu", "cuda"]
    device_count: int  # devices that did the work in `stats`, for the sum of their peaks
    dtype: str  # "bfloat16", "float16" or "float32"
    tensor_parallel: int  # of the engine, or of each replica
    max_batch_size: int  # of the engine, or of each replica
    config: ModelConfig  # with the formats of the weights in memory
    stats: EngineStats  # of all replicas together
    peak_memory_bytes: int  # resident memory of this process
    peak_gpu_memory_bytes: int | None = None  # of the GPU that used the most; None on a CPU
    kernels: tuple[str, ...] = ()  # those other than the defaults, each in words
    replicas: tuple[ReplicaSummary, ...] = ()  # empty for one engine
    replicas_device: str | None = None  # device name of a replica: a GPU's name, or "cpu"


def peak_resident_bytes() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def thread_waits() -> dict[str, float]:
    """Seconds that each thread of this process was ready to run but had no core, by thread id.

    Other processes then used the cores. Empty where the system does not count this (only Linux
    does).
    """
    waits = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has ended
                waits[thread.name] = int((thread / "schedstat").read_text().split()[1]) * 1e-9
    return waits


def longest_wait(before: dict[str, float], after: dict[str, float]) -> float:
    """The longest wait of a thread between two results of `thread_waits`, in seconds."""
    return max((wait - before.get(thread, 0.0) for thread, wait in after.items()), default=0.0)
