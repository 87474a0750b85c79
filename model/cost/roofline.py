"""The minimum time of a step on a device, and the limit that determines it.

The roofline model (Williams, Waterman, Patterson 2009) with kernel launches as a third limit:
compute, memory traffic and launches are assumed to overlap perfectly, so the time is the longest
of them. Communication between GPUs adds to it.
"""

from dataclasses import dataclass
from typing import Literal, cast

from model.config import ModelConfig
from model.cost.devices import Device
from model.cost.interconnect import NO_EXCHANGE, Exchange, exchange
from model.cost.operations import kv_bytes_per_sequence, operations, parameter_bytes, total
from model.cost.rates import step_seconds
from model.cost.workload import Op, Workload

Limit = Literal["compute", "memory", "launch", "link"]
USABLE_MEMORY = 0.9  # share of GPU memory for weights and KV; activations and torch need the rest


@dataclass(frozen=True)
class Bound:
    """The minimum time of a step on a device, in seconds; mfu and mbu are shares from 0 to 1."""

    device: Device
    limit: Limit
    compute_s: float
    memory_s: float
    launch_s: float
    tok_s: float
    mfu: float  # matrix FLOPs over peak: model FLOPs utilization
    mbu: float  # bytes over bandwidth: memory bandwidth utilization
    link_s: float = 0.0  # communication with other GPUs
    measured_s: float | None = None  # at the measured rates of the device's kernels, if it has them

    @property
    def seconds(self) -> float:
        """Return the time of the step."""
        if self.measured_s is not None:
            return self.measured_s + self.link_s
        return max(self.compute_s, self.memory_s, self.launch_s) + self.link_s


def bound_step(config: ModelConfig, work: Workload, device: Device) -> Bound:
    """Bound a step of a model; at the measured rates of the device's kernels, if it has them."""
    step = total(operations(config, work))
    measured_s = None
    if device.rates is not None and not work.backward:
        measured_s = step_seconds(config, work, device.rates)
    sent = exchange(config, work)
    return bound(step, device, work.dtype, work.tokens, sent, measured_s)


def bound(
    step: Op,
    device: Device,
    dtype: str,
    tokens: int,
    sent: Exchange = NO_EXCHANGE,
    measured_s: float | None = None,
) -> Bound:
    """Bound a step from the total of its operations, its tokens and the bytes each GPU sends.

    measured_s: the time that the measured rates of kernels predict, in place of the bound.
    """
    matrix = matrix_seconds(step, device, dtype)
    compute = max(
        matrix,
        step.flops.vector / device.vector,
        step.flops.special / device.special,
    )
    memory = step.bytes.total / device.bandwidth
    launch = step.launches * device.launch_s
    link = sent.seconds(device.link)
    longest = max(compute, memory, launch, link)
    seconds = (max(compute, memory, launch) if measured_s is None else measured_s) + link
    return Bound(
        device,
        _limit_name(longest, compute=compute, memory=memory, launch=launch, link=link),
        compute,
        memory,
        launch,
        tok_s=tokens / seconds,
        mfu=matrix / seconds,
        mbu=memory / seconds,
        link_s=link,
        measured_s=measured_s,
    )


def matrix_seconds(step: Op, device: Device, dtype: str) -> float:
    """Return the seconds of the matrix products at the peaks of the dtypes that they multiply."""
    peak = device.peak(dtype)
    eights = sum(product.flops for product in step.products if product.is_float8)
    float8 = device.peaks.get("float8", peak)
    return (step.flops.matrix - eights) / peak + eights / float8


def _limit_name(longest: float, **limits: float) -> Limit:
    return cast(Limit, next(name for name, seconds in limits.items() if seconds == longest))


def largest_batch(config: ModelConfig, work: Workload, device: Device) -> int:
    """Return how many sequences of the workload's context fit beside the weights."""
    parts = work.tensor_parallel
    weights = parameter_bytes(config, work.dtype, parts)
    room = int(device.memory * USABLE_MEMORY) - weights
    return max(0, room // kv_bytes_per_sequence(config, work.context, work.dtype, parts))
