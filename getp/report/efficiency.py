"""The efficiency of a run: its speed relative to the limits of its device."""

from dataclasses import dataclass, replace

import torch

from engine import EngineStats
from engine.summary import RunSummary
from getp.machine import peaks_of
from getp.report.losses import FinishedRun, largest_loss
from model.config import ModelConfig
from model.cost.devices import Device, device_of_driver
from model.cost.measure import store_efficiency
from model.cost.operations import operations, total
from model.cost.roofline import matrix_seconds
from model.cost.workload import DTYPE_BYTES, Op, Phase, Workload
from model.formats import DENSE

_COMPRESSED_BYTES = 1.5  # of a value of weights that are compressed: see EngineStats
_MIN_SECONDS = 1.0  # in a shorter run the start-up distorts the efficiency


@dataclass(frozen=True)
class RunEfficiency:
    """The utilization of the device and the largest loss of a run; None if no step ran."""

    mfu: float | None = None  # matrix FLOPs over peak: model FLOPs utilization
    mbu: float | None = None  # bytes over bandwidth: memory bandwidth utilization
    bound: str | None = None  # the tighter limit of the device: compute or memory
    limit_share: float | None = None  # minimum time at the device's peaks / inference time
    largest_loss: str | None = None  # as a clause for the report
    peaks: str | None = None  # name of the device, and the source of its peaks
    peak_flops: float | None = None  # of the device in this dtype, FLOP/s
    bandwidth: float | None = None  # of the device's memory, bytes/s


def run_efficiency(run: RunSummary, inference_s: float, requests: int) -> RunEfficiency:
    """Return the efficiency of a finished run of `requests` requests in `inference_s` seconds.

    The peaks are the datasheet's for a known device; otherwise they are measured once and stored.
    """
    if not run.stats.steps or not inference_s:
        return RunEfficiency()
    device = _device(run)
    if device is None:
        return RunEfficiency()
    # A tensor-parallel engine counts the work of all GPUs: compare one GPU's share with its peaks.
    # Ranks on a CPU share one processor, and the peaks of replicas are summed.
    ranks = run.tensor_parallel if run.device_type == "cuda" and not run.replicas else 1
    cost = run_cost(run.config, run.dtype, run.stats, ranks)
    compute = matrix_seconds(cost, device, run.dtype)
    memory = cost.bytes.total / device.bandwidth
    limit = max(compute, memory)
    finished = FinishedRun(
        run.config, run.dtype, device, run.stats, run.max_batch_size, inference_s, requests
    )
    return RunEfficiency(
        mfu=compute / inference_s,
        mbu=memory / inference_s,
        bound="compute" if compute >= memory else "memory",
        limit_share=limit / inference_s,
        largest_loss=largest_loss(finished, limit),
        peaks=f"{device.name}: {device.source}",
        peak_flops=device.peak(run.dtype),
        bandwidth=device.bandwidth,
    )


def run_cost(config: ModelConfig, dtype: str, stats: EngineStats, tensor_parallel: int = 1) -> Op:
    """Return the cost of all steps as that of one operation, as if kernels were fused.

    It is computed at the mean context of decoded tokens and the mean size of prefill chunks, which
    is exact except for windows and rounding. Each step reads the weights once, some of them dense
    weights in 12 bits.
    """
    parts = []
    if stats.decode_tokens:
        context = max(1, round(stats.decode_context / stats.decode_tokens))
        step = total(operations(config, _work("decode", 1, context, dtype, tensor_parallel)))
        parts.append(step.repeated(stats.decode_tokens))
    if stats.prefill_chunks:
        query = max(1, round(stats.prefill_tokens / stats.prefill_chunks))
        context = max(query, round(stats.prefill_context / stats.prefill_chunks))
        step = total(operations(config, _work("prefill", query, context, dtype, tensor_parallel)))
        parts.append(step.repeated(stats.prefill_chunks))
    run = total(parts)
    tokens = max(1, round((stats.decode_tokens + stats.prefill_tokens) / stats.steps))
    ops = operations(config, Workload("decode", tokens, 1, 1, dtype, tensor_parallel))
    weights = total(ops).bytes.weights * stats.steps
    dense: float = sum(
        each.weights for op in ops for each in op.products if each.kind == DENSE.name
    )
    weights -= round(stats.compressed_steps * dense * (DTYPE_BYTES[dtype] - _COMPRESSED_BYTES))
    return replace(run, bytes=replace(run.bytes, weights=weights))


def record_efficiency(
    run: RunSummary, model: str, efficiency: RunEfficiency, inference_s: float
) -> None:
    """Record the efficiency of a long enough run, for the predictions of `-m plan -i`.

    Runs on several devices do not count: their communication would look like slow devices.
    """
    if efficiency.limit_share is None or run.tensor_parallel > 1 or run.replicas:
        return
    if inference_s >= _MIN_SECONDS:
        store_efficiency(_target(run), model, efficiency.limit_share)


def _work(phase: Phase, query: int, context: int, dtype: str, tensor_parallel: int) -> Workload:
    return Workload(phase, 1, query, context, dtype, tensor_parallel, fused=True, causal=True)


def _device(run: RunSummary) -> Device | None:
    """Return the devices of the run as one device; None for unknown GPUs of other hosts."""
    known = None
    if run.device_type == "cuda":
        known = device_of_driver(run.replicas_device or run.device)
        if known is None and run.replicas:
            return None
    one = known or peaks_of(_target(run))
    count = run.device_count
    if count == 1:
        return one
    return replace(
        one,
        name=f"{count} × {one.name}",
        peaks={dtype: peak * count for dtype, peak in one.peaks.items()},
        bandwidth=one.bandwidth * count,
    )


def _target(run: RunSummary) -> torch.device:
    """Return the torch device of an engine in this process."""
    if run.device_type == "cpu":
        return torch.device("cpu")
    names = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
    return torch.device("cuda", list(names).index(run.device))
