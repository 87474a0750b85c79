"""Mode profile: where a step's time goes, measured, beside what the cost model says it needs."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch

from engine import Engine
from engine.step_probe import Probe
from getp.analysis.part_timer import Launches, Step, count_launches, time_parts
from model.config import ModelConfig
from model.cost.devices import Device
from model.cost.flops import Flops
from model.cost.operations import operations
from model.cost.workload import Bytes, Op, Phase, Workload
from model.ops.step_parts import FUSED_INTO, OTHER

WARM_UP_STEPS = 2
MIN_STEPS = 8
MEASURE_S = 10.0  # no step begins later, beyond the least number
_AGREED = 0.03  # the parts and the step being so close, nothing disturbs them

# Not of the cost model; the first two are the host's.
HOST_PARTS = ("scheduling", "batch_preparation")
_ORDER = (
    *HOST_PARTS,
    *"embedding input_norm qkv_proj rope attention o_proj post_norm router".split(),
    *"gate_up_proj activation down_proj final_norm lm_head sampling".split(),
    OTHER,
)

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Times:
    """Seconds of a step: left alone, and followed, the parts of which add up to it."""

    alone_s: float
    parts: dict[str, float]
    steps: int = 1  # measured of each kind

    @property
    def followed_s(self) -> float:
        """The step while it is followed."""
        return sum(self.parts.values())

    @property
    def slowdown(self) -> float:
        """By which share following slows the step; noise can make it negative."""
        return self.followed_s / self.alone_s - 1


@dataclass(frozen=True)
class Component:
    """One part of the step: what it took, and what the cost model says of it."""

    name: str
    seconds: float
    launches: int
    busy_s: float | None  # on a GPU: what its kernels ran
    op: Op  # all zero for what the cost model does not know, and within another
    within: str | None = None  # the part that did this one, too; its op is that of both


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
        """Seconds of the step, nothing following it."""
        return self.times.alone_s

    @property
    def tok_s(self) -> float:
        """Tokens computed a second."""
        return self.work.tokens / self.step_s

    @property
    def launches(self) -> int:
        """Kernels (on a CPU: operations) of the step."""
        return sum(part.launches for part in self.components)

    @property
    def within(self) -> dict[str, str]:
        """The parts that others did, each with the name of the one that did it."""
        return {part.name: part.within for part in self.components if part.within}

    @property
    def ops(self) -> list[Op]:
        """What the cost model says of the step."""
        return [part.op for part in self.components if part.op.layer_count]

    def seconds_of(self, *names: str) -> float:
        """Seconds of these parts, of the step that nothing follows."""
        return self._scale * sum(part.seconds for part in self.components if part.name in names)

    @property
    def busy_s(self) -> float | None:
        """Seconds that the GPU ran kernels; None on a CPU."""
        busy = [part.busy_s for part in self.components if part.busy_s is not None]
        return sum(busy) if busy else None

    @property
    def _scale(self) -> float:
        return self.times.alone_s / self.times.followed_s


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
    """Measure the step on a warm engine. Raises EngineError if it has no room for it."""
    probe = Probe(engine, batch, query, context)
    times = measure(probe.step, engine.device)
    launches = count_launches(probe.step, engine.device, trace)
    dtype = str(engine.dtype).removeprefix("torch.")
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
    """Put what was measured beside what the cost model says."""
    known = operations(config, work)
    within = {
        op.name: FUSED_INTO[op.name]
        for op in known
        if op.name not in times.parts and FUSED_INTO.get(op.name) in times.parts
    }
    ops = {op.name: op for op in gather(known, within)}
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
        for name in _ORDER
        if name in found
    ]
    return Profile(config, work, device, on_gpu, times, components)


def gather(ops: Iterable[Op], within: Mapping[str, str]) -> list[Op]:
    """Add operations done within others to those."""
    found = {op.name: op for op in ops}
    for inner, outer in within.items():
        one, both = found.pop(inner), found[outer]
        found[outer] = replace(
            both,
            flops=both.flops + one.flops,
            bytes=both.bytes + one.bytes,
            launches=both.launches + one.launches,
        )
    return [*found.values()]


def measure(step: Step, device: torch.device, limit_s: float = MEASURE_S) -> Times:
    """Run the step alone and followed by turns, so that a slower minute slows both.

    Goes on until they agree: on a busy machine that takes more steps.
    """
    for _ in range(WARM_UP_STEPS):
        step()
    alone: list[float] = []
    followed: list[dict[str, float]] = []
    start = time.perf_counter()
    while True:
        alone.append(_seconds(step, device))
        followed.append(time_parts(step, device))
        times, taken = _times(alone, followed), time.perf_counter() - start
        settled = taken > limit_s / 8 and abs(times.slowdown) < _AGREED
        if len(alone) >= MIN_STEPS and (settled or taken > limit_s):
            return times


def _times(alone: list[float], followed: list[dict[str, float]]) -> Times:
    """The mean of the steps that nothing disturbed, and of their parts."""
    kept = _undisturbed(followed, [sum(one.values()) for one in followed])
    names = {name for one in kept for name in one}
    mean = {name: sum(one.get(name, 0.0) for one in kept) / len(kept) for name in names}
    fastest = _undisturbed(alone, alone)
    return Times(sum(fastest) / len(fastest), mean, len(alone))


def _seconds(step: Step, device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _undisturbed(values: list[_Value], order: list[float]) -> list[_Value]:
    """The first quarter of the values in this order: what else the machine does only adds."""
    ranked = [value for _, value in sorted(zip(order, values, strict=True), key=lambda p: p[0])]
    return ranked[: max(1, len(ranked) // 4)]
