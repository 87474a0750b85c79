"""Mode profile: the measured time of each part of a step, beside its cost by the cost model."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from engine import Engine
from engine.resolve import dtype_name
from engine.step_probe import StepProbe
from getp.analysis.part_timer import Launches, Step, count_launches, time_parts
from model.config import ModelConfig
from model.cost.devices import Device
from model.cost.flops import Flops
from model.cost.operations import operations
from model.cost.workload import Bytes, Op, Phase, Workload
from model.ops.step_parts import ALL_PARTS, FUSED_INTO

WARM_UP_STEPS = 2
MIN_STEPS = 8
MEASURE_S = 10.0  # after MIN_STEPS, no step starts later than this
_AGREEMENT = 0.03  # largest slowdown at which the measurement is accepted as undisturbed

HOST_PARTS = ("scheduling", "batch_preparation")

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Times:
    """Seconds of an undisturbed step, and of the parts of a step that is timed by part."""

    step_s: float
    parts: dict[str, float]
    steps: int = 1  # measured of each kind

    @property
    def timed_s(self) -> float:
        """Return the seconds of the step while its parts are timed."""
        return sum(self.parts.values())

    @property
    def slowdown(self) -> float:
        """Return the share by which timing the parts slows the step; noise can make it negative."""
        return self.timed_s / self.step_s - 1


@dataclass(frozen=True)
class Component:
    """One part of the step: its measured time and launches, and its cost by the cost model."""

    name: str
    seconds: float
    launches: int
    busy_s: float | None  # on a GPU: seconds in which its kernels ran
    op: Op  # zero if the cost model does not cover the part, or if it is fused into another part
    within: str | None = None  # the part that it is fused into; the op of that part includes it


@dataclass(frozen=True)
class Profile:
    """A measured step on a device."""

    config: ModelConfig
    work: Workload
    device: Device
    on_gpu: bool
    times: Times
    components: list[Component]

    @property
    def step_s(self) -> float:
        """Return the seconds of the undisturbed step."""
        return self.times.step_s

    @property
    def tok_s(self) -> float:
        """Return the tokens computed per second."""
        return self.work.tokens / self.step_s

    @property
    def launches(self) -> int:
        """Return the number of kernels (on a CPU: operations) that the step launches."""
        return sum(part.launches for part in self.components)

    @property
    def within(self) -> dict[str, str]:
        """Return the parts that are fused into others, with the names of those."""
        return {part.name: part.within for part in self.components if part.within}

    @property
    def ops(self) -> list[Op]:
        """Return the operations of the step by the cost model."""
        return [part.op for part in self.components if part.op.layer_count]

    def seconds_of(self, *names: str) -> float:
        """Return the seconds of these parts, scaled to the undisturbed step."""
        return self._scale * sum(part.seconds for part in self.components if part.name in names)

    @property
    def busy_s(self) -> float | None:
        """Return the seconds in which the GPU ran kernels; None on a CPU."""
        busy = [part.busy_s for part in self.components if part.busy_s is not None]
        return sum(busy) if busy else None

    @property
    def _scale(self) -> float:
        return self.times.step_s / self.times.timed_s


def profile(
    engine: Engine,
    device: Device,
    *,
    phase: str,
    batch: int,
    query: int,
    context: int,
    trace: str | None = None,
) -> Profile:
    """Measure one step of an engine. trace: file for a Chrome trace of it.

    Raises EngineError if the engine has no room for such a step.
    """
    probe = StepProbe(engine, batch, query, context)
    times = measure_times(probe.step, engine.device)
    launches = count_launches(probe.step, engine.device, trace)
    probe.release()
    dtype = dtype_name(engine.dtype)
    work = Workload(cast(Phase, phase), batch, query, context, dtype, causal=True)
    return assemble(engine.held_config, work, device, engine.device.type == "cuda", times, launches)


def assemble(
    config: ModelConfig,
    work: Workload,
    device: Device,
    on_gpu: bool,
    times: Times,
    launches: Launches,
) -> Profile:
    """Join the measurements with the costs of the cost model."""
    known = operations(config, work)
    within = {
        op.name: FUSED_INTO[op.name]
        for op in known
        if op.name not in times.parts and FUSED_INTO.get(op.name) in times.parts
    }
    ops = {op.name: op for op in merge_fused_ops(known, within)}
    found = times.parts.keys() | ops.keys() | within.keys()
    components = [
        Component(
            name,
            times.parts.get(name, 0.0),
            launches.count.get(name, 0),
            None if launches.busy_s is None else launches.busy_s.get(name, 0.0),
            ops.get(name, Op(name, 0, Flops(), Bytes(), 0)),
            within.get(name),
        )
        for name in ALL_PARTS
        if name in found
    ]
    return Profile(config, work, device, on_gpu, times, components)


def merge_fused_ops(ops: Iterable[Op], within: Mapping[str, str]) -> list[Op]:
    """Add the costs of fused operations to those of the operations they are fused into."""
    found = {op.name: op for op in ops}
    for inner, outer in within.items():
        one, both = found.pop(inner), found[outer]
        found[outer] = both.plus(one, both.layer_count)
    return [*found.values()]


def measure_times(step: Step, device: torch.device, limit_s: float = MEASURE_S) -> Times:
    """Time whole steps and steps by part, alternately, so that slow periods affect both.

    Stops when both agree, which takes more steps on a busy machine, or after `limit_s` seconds.
    """
    for _ in range(WARM_UP_STEPS):
        step()
    whole: list[float] = []
    timed: list[dict[str, float]] = []
    start = time.perf_counter()
    while True:
        whole.append(_seconds(step, device))
        timed.append(time_parts(step, device))
        times, taken = _times(whole, timed), time.perf_counter() - start
        settled = taken > limit_s / 8 and abs(times.slowdown) < _AGREEMENT
        if len(whole) >= MIN_STEPS and (settled or taken > limit_s):
            return times


def _times(whole: list[float], timed: list[dict[str, float]]) -> Times:
    """Return the mean of the fastest steps and of the parts of the fastest timed steps."""
    kept = _fastest(timed, [sum(one.values()) for one in timed])
    names = {name for one in kept for name in one}
    mean = {name: sum(one.get(name, 0.0) for one in kept) / len(kept) for name in names}
    fastest = _fastest(whole, whole)
    return Times(sum(fastest) / len(fastest), mean, len(whole))


def _seconds(step: Step, device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _fastest(values: list[_Value], seconds: list[float]) -> list[_Value]:
    """Return the fastest quarter of the values: other processes only add time."""
    ranked = [value for _, value in sorted(zip(seconds, values, strict=True), key=lambda p: p[0])]
    return ranked[: max(1, len(ranked) // 4)]
