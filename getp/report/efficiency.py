"""How close a run came to what its device can do, and what cost it most."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from engine import EngineStats
from model.config import ModelConfig
from model.cost.devices import Device, device_of_driver
from model.cost.flops import Flops
from model.cost.measure import hardware_name, local_device, note_reached
from model.cost.operations import operations, total
from model.cost.workload import Bytes, Workload

if TYPE_CHECKING:
    from engine import Engine

_LONG_ENOUGH_S = 1.0  # for its start not to count


@dataclass(frozen=True)
class Explanation:
    """Shares are of the inference time or of the device's peaks; None: nothing ran."""

    mfu: float | None = None  # matrix FLOPs over peak: model FLOPs utilization
    mbu: float | None = None  # bytes over bandwidth: memory bandwidth utilization
    bound: str | None = None  # compute or memory: what limits such a run at best
    limit_share: float | None = None  # least time the device needs, over the time taken
    largest_loss: str | None = None  # in one sentence
    peaks: str | None = None  # which device, and where its peaks are from


def explain(engine: "Engine", inference_s: float, requests: int) -> Explanation:
    """Explain a finished run of so many requests.

    The device's peaks are those of the table; where it is not in it, they are measured, once.
    """
    if not engine.stats.steps or not inference_s:
        return Explanation()
    device = peaks_of(engine.device)
    dtype = str(engine.dtype).removeprefix("torch.")
    # Ranks on a CPU share what it can do; a GPU each has its own, and a part of the work.
    parts = 1 if engine.device.type == "cpu" else engine.tensor_parallel
    return explain_counts(
        engine.held_config,
        dtype,
        device,
        engine.stats,
        inference_s,
        requests,
        engine.max_batch_size,
        parts,
    )


def explain_counts(
    config: ModelConfig,
    dtype: str,
    device: Device,
    stats: EngineStats,
    inference_s: float,
    requests: int,
    max_batch_size: int,
    tensor_parallel: int = 1,
) -> Explanation:
    """Explain a run from the engine's counters; of several GPUs, what one of them did."""
    cost, moved = run_cost(config, dtype, stats, tensor_parallel)
    compute, memory = cost.matrix / device.peak(dtype), moved.total / device.bandwidth
    limit = max(compute, memory)
    losses = [
        *_time_outside(stats, inference_s),
        _recomputing(stats, inference_s, requests),
        _small_batch(config, dtype, device, stats, max_batch_size),
        *_beyond_the_limit(config, dtype, device, stats, inference_s, limit),
    ]
    return Explanation(
        mfu=compute / inference_s,
        mbu=memory / inference_s,
        bound="compute" if compute >= memory else "memory",
        limit_share=limit / inference_s,
        largest_loss=max(losses)[1],
        peaks=f"{device.name}: {device.source}",
    )


def run_cost(
    config: ModelConfig, dtype: str, stats: EngineStats, tensor_parallel: int = 1
) -> tuple[Flops, Bytes]:
    """Work out FLOPs and bytes of all steps, activations staying on the chip where they can.

    Decoded tokens count at their mean context and prefill chunks at their mean size, which is
    exact but for windows and rounding; each step reads the weights once.
    """
    cost, moved = Flops(), Bytes()
    if stats.decode_tokens:
        context = max(1, round(stats.decode_context / stats.decode_tokens))
        step = total(operations(config, _work("decode", 1, context, dtype, tensor_parallel)))
        cost += step.flops * stats.decode_tokens
        moved += Bytes(0, step.bytes.activations, step.bytes.kv) * stats.decode_tokens
    if stats.prefill_chunks:
        query = max(1, round(stats.prefill_tokens / stats.prefill_chunks))
        context = max(query, round(stats.prefill_context / stats.prefill_chunks))
        step = total(operations(config, _work("prefill", query, context, dtype, tensor_parallel)))
        cost += step.flops * stats.prefill_chunks
        moved += Bytes(0, step.bytes.activations, step.bytes.kv) * stats.prefill_chunks
    tokens = max(1, round((stats.decode_tokens + stats.prefill_tokens) / stats.steps))
    step = total(operations(config, Workload("decode", tokens, 1, 1, dtype, tensor_parallel)))
    return cost, moved + Bytes(step.bytes.weights) * stats.steps


def remember(engine: "Engine", model: str, found: Explanation, inference_s: float) -> None:
    """Keep what a run reached for `-m plan -i` to predict with, if it was long enough to count."""
    if found.limit_share is None or engine.tensor_parallel > 1:
        return  # what GPUs send each other would be counted as a GPU's own slowness
    if inference_s >= _LONG_ENOUGH_S:
        note_reached(engine.device, model, found.limit_share)


def as_report(found: Explanation) -> dict[str, float | str | None]:
    """Return it as a part of the report."""
    return asdict(found)


def _work(phase: str, query: int, context: int, dtype: str, tensor_parallel: int) -> Workload:
    return Workload(
        "prefill" if phase == "prefill" else "decode", 1, query, context, dtype, tensor_parallel,
        fused=True, causal=True,
    )  # fmt: skip


def _time_outside(stats: EngineStats, inference_s: float) -> list[tuple[float, str]]:
    outside = max(0.0, inference_s - stats.schedule_s - stats.model_s)
    return [
        (
            outside,
            f"{outside / inference_s:.0%} of the time the device waited for prompts to be read "
            "and results to be taken",
        ),
        (
            stats.schedule_s,
            f"{stats.schedule_s / inference_s:.0%} of the time the device waited for the scheduler",
        ),
    ]


def _recomputing(stats: EngineStats, inference_s: float, requests: int) -> tuple[float, str]:
    """Tokens computed again after a preemption; a request's last token is never computed."""
    computed = stats.decode_tokens + stats.prefill_tokens
    needed = stats.prompt_tokens - stats.cached_tokens + stats.output_tokens - requests
    again = max(0, computed - needed) if stats.preemptions else 0
    seconds = stats.model_s * again / max(1, computed)
    return (
        seconds,
        f"{seconds / inference_s:.0%} of the time went to computing tokens again after "
        f"{stats.preemptions} preemptions: KV memory was full",
    )


def _small_batch(
    config: ModelConfig, dtype: str, device: Device, stats: EngineStats, most: int
) -> tuple[float, str]:
    """What decoding at the largest batch would have saved, by the model's bound."""
    batch = stats.batch_sum / stats.steps
    if not stats.decode_tokens or batch >= most:
        return 0.0, ""
    context = max(1, round(stats.decode_context / stats.decode_tokens))

    def per_token(size: int) -> float:
        step = total(operations(config, Workload("decode", size, 1, context, dtype, fused=True)))
        compute = step.flops.matrix / device.peak(dtype)
        return max(compute, step.bytes.total / device.bandwidth) / size

    saved = 1 - per_token(most) / per_token(max(1, round(batch)))
    decoding = stats.decode_tokens / (stats.decode_tokens + stats.prefill_tokens)
    reasons = {
        "no more requests": stats.short_steps,
        "KV memory was full": stats.kv_full_steps,
        "new requests waited to start together": stats.gathering_steps,
    }
    why = max(reasons, key=lambda reason: reasons[reason])
    return stats.model_s * decoding * saved, f"decode ran at batch {batch:.0f} of {most}: {why}"


def _beyond_the_limit(
    config: ModelConfig, dtype: str, device: Device, stats: EngineStats, inference_s: float,
    limit: float,
) -> list[tuple[float, str]]:  # fmt: skip
    """What the model's steps took beyond the device's limit: starting operations, and the rest."""
    beyond = max(0.0, stats.model_s - limit)
    launches = total(operations(config, Workload("decode", 1, 1, 1, dtype))).launches
    launching = min(beyond, stats.steps * launches * device.launch_s)
    rest = beyond - launching
    return [
        (
            launching,
            f"{launching / inference_s:.0%} of the time went to starting {launches:,} operations "
            "a step one by one",
        ),
        (
            rest,
            f"{rest / inference_s:.0%} of the time went to kernels and sampling beyond what the "
            "device needs at its peak",
        ),
    ]


def peaks_of(target: torch.device) -> Device:
    """Return the device of the table that this is, else what is measured of it."""
    known = device_of_driver(hardware_name(target)) if target.type == "cuda" else None
    return known or local_device(target).device
