"""How fast a device can do a step at best, and what stops it from being faster.

The roofline model (Williams, Waterman, Patterson 2009) with kernel launches as a third limit:
each of compute, memory and launches is taken to overlap the others perfectly, so the longest one
is the time. What GPUs send each other comes on top.
"""

from dataclasses import dataclass
from typing import Literal, cast

from model.config import ModelConfig
from model.cost.devices import Device
from model.cost.interconnect import NOTHING, Exchange
from model.cost.operations import kv_bytes_per_sequence, parameter_bytes
from model.cost.workload import Op, Workload

Limit = Literal["compute", "memory", "launch", "link"]
USABLE_MEMORY = 0.9  # of a GPU's memory, by weights and KV; the rest for activations and torch


@dataclass(frozen=True)
class Bound:
    """The best a device can do; times in seconds, shares of the device's peaks from 0 to 1."""

    device: Device
    limit: Limit
    compute_s: float
    memory_s: float
    launch_s: float
    tok_s: float
    mfu: float  # matrix FLOPs over peak: model FLOPs utilization
    mbu: float  # bytes over bandwidth: memory bandwidth utilization
    link_s: float = 0.0  # sending to other GPUs

    @property
    def seconds(self) -> float:
        """Time of the step."""
        return max(self.compute_s, self.memory_s, self.launch_s) + self.link_s


def bound(step: Op, device: Device, dtype: str, tokens: int, sent: Exchange = NOTHING) -> Bound:
    """Bound a step, given the total of its operations, its tokens and what a GPU sends."""
    compute = max(
        step.flops.matrix / device.peak(dtype),
        step.flops.vector / device.vector,
        step.flops.special / device.special,
    )
    memory = step.bytes.total / device.bandwidth
    launch = step.launches * device.launch_s
    link = sent.seconds(device.link)
    longest = max(compute, memory, launch, link)
    seconds = max(compute, memory, launch) + link
    return Bound(
        device,
        _name(longest, compute=compute, memory=memory, launch=launch, link=link),
        compute,
        memory,
        launch,
        tok_s=tokens / seconds,
        mfu=step.flops.matrix / device.peak(dtype) / seconds,
        mbu=memory / seconds,
        link_s=link,
    )


def _name(longest: float, **limits: float) -> Limit:
    return cast(Limit, next(name for name, seconds in limits.items() if seconds == longest))


def largest_batch(config: ModelConfig, work: Workload, device: Device) -> int:
    """Sequences of the workload's context that fit beside the weights; 0 if not even one."""
    parts = work.tensor_parallel
    weights = parameter_bytes(config, work.dtype, parts)
    room = int(device.memory * USABLE_MEMORY) - weights
    return max(0, room // kv_bytes_per_sequence(config, work.context, work.dtype, parts))
