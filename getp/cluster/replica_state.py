"""The driver's state of a replica, over all the processes that have run it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from typing import Any

from engine import Completion, EngineStats, ReplicaSummary
from getp.cluster.replica import Results, StartReport

_STARTING = ("warm_up_s", "load_s", "compile_s", "capture_s")
_MEANS = ("schedule_s", "model_s", *_STARTING, "inference_s", "cpu_wait_s", "finish_s")
_MAXIMA = ("peak_batch",)
_CURRENT = ("kv_blocks", "kv_bytes", "peak_kv_blocks", "used_kv_blocks", "running", "waiting")


@dataclass
class ReplicaState:
    """Counters and the current process of a replica."""

    index: int
    generation: int = 0  # number of processes started so far; events of earlier ones are ignored
    deaths: int = 0
    deaths_in_a_row: int = 0  # without a finished request in between
    reassigned: int = 0  # requests lost with a process and assigned again
    requests: int = 0  # finished requests
    output_tokens: int = 0
    started: StartReport | None = None  # report of the latest start
    ready: bool = False  # False while the process starts
    stats: EngineStats = field(default_factory=EngineStats)  # counters of the current process
    earlier_stats: list[EngineStats] = field(default_factory=list)  # counters of earlier processes
    peak_memory: int = 0
    peak_gpu_memory: int = 0
    actor: Any = None

    @property
    def all_stats(self) -> list[EngineStats]:
        """Return the counters of all its processes."""
        return [*self.earlier_stats, self.stats]

    def update(self, results: Results) -> None:
        """Update the counters from results."""
        self.stats = results.stats
        self.peak_memory = max(self.peak_memory, results.peak_memory)
        self.peak_gpu_memory = max(self.peak_gpu_memory, results.peak_gpu_memory)
        self.requests += len(results.finished)
        self.output_tokens += sum(len(done.token_ids) for done, _ in results.finished)
        if results.finished:
            self.deaths_in_a_row = 0

    def record_death(self, reassigned: int) -> None:
        """Count the death of the current process, which held that many requests."""
        self.reassigned += reassigned
        self.deaths += 1
        self.deaths_in_a_row += 1
        self.earlier_stats.append(self.stats)
        self.stats = EngineStats()

    def summary(self, busy_s: float, inference_s: float) -> ReplicaSummary:
        """Return the data of this replica for the report."""
        steps = sum(stats.steps for stats in self.all_stats)
        batch_sum = sum(stats.batch_sum for stats in self.all_stats)
        return ReplicaSummary(
            replica=self.index,
            host=self.started.host if self.started else None,
            requests=self.requests,
            output_tokens=self.output_tokens,
            output_tok_s=self.output_tokens / inference_s if inference_s else 0.0,
            busy=busy_s / inference_s if inference_s else 0.0,
            mean_batch=batch_sum / steps if steps else 0.0,
            deaths=self.deaths,
            requests_left_to_others=self.reassigned,
            peak_memory_bytes=self.peak_memory,
        )


Handler = Callable[[ReplicaState, Any], list[Completion]]


@dataclass(frozen=True)
class Event:
    """The result of a remote call to a replica, and the method that handles it."""

    replica: ReplicaState
    generation: int  # generation of the replica at the time of the call
    handler: Handler
    answer: "Future[Any]"


def merged_stats(replicas: Sequence[ReplicaState]) -> EngineStats:
    """Return the counters of all replicas together; seconds are means over the replicas."""
    every = [stats for replica in replicas for stats in replica.all_stats]
    merged = EngineStats()
    for name in (each.name for each in fields(EngineStats)):
        values = [getattr(stats, name) for stats in every]
        if name in _MEANS:
            value = sum(values) / len(replicas)
        elif name in _CURRENT:
            value = sum(getattr(replica.stats, name) for replica in replicas)
        else:
            value = max(values) if name in _MAXIMA else sum(values)
        setattr(merged, name, value)
    return merged


def missing_notice(missing: Sequence[ReplicaState], count: int) -> str:
    """Return the message that some of `count` replicas are not ready after a long time."""
    shown = ", ".join(str(replica.index) for replica in missing[:8])
    return (
        f"getp: waiting for {len(missing)} of {count} replicas to load the model or to get free "
        f"resources: {shown}"
    )
