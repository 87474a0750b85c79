"""The largest loss of time in a run, as a clause for the report."""

from dataclasses import dataclass, replace

from engine import EngineStats
from model.config import ModelConfig
from model.cost.devices import Device
from model.cost.operations import operations, total
from model.cost.roofline import bound_step
from model.cost.workload import Workload


@dataclass(frozen=True)
class FinishedRun:
    """A run of at least one step."""

    config: ModelConfig  # with the weight format that the engine holds
    dtype: str
    device: Device
    stats: EngineStats
    max_batch_size: int
    inference_s: float
    requests: int


@dataclass(frozen=True)
class _Loss:
    seconds: float
    sentence: str


def largest_loss(run: FinishedRun, limit_s: float) -> str:
    """Describe the largest loss. limit_s: minimum time of the run at the device's peaks."""
    losses = [
        _reading_and_writing(run),
        _scheduling(run),
        _recomputing(run),
        _other_processes(run),
        *_small_batch(run),
        *_below_peak(run, limit_s),
    ]
    return max(losses, key=lambda loss: loss.seconds).sentence


def _reading_and_writing(run: FinishedRun) -> _Loss:
    stats = run.stats
    seconds = max(0.0, run.inference_s - stats.schedule_s - stats.model_s)
    return _Loss(
        seconds,
        f"{seconds / run.inference_s:.0%} of the time the device waited for prompts to be read "
        "and results to be written",
    )


def _scheduling(run: FinishedRun) -> _Loss:
    seconds = run.stats.schedule_s
    return _Loss(
        seconds,
        f"{seconds / run.inference_s:.0%} of the time the device waited for the scheduler",
    )


def _recomputing(run: FinishedRun) -> _Loss:
    """Return the time of tokens recomputed after preemptions.

    The last token of a request is sampled but never used as input, so it is not computed.
    """
    stats = run.stats
    rejected = stats.draft_tokens - stats.accepted_tokens
    computed = stats.decode_tokens + stats.prefill_tokens - rejected
    needed = stats.prompt_tokens - stats.cached_tokens + stats.output_tokens - run.requests
    recomputed = max(0, computed - needed) if stats.preemptions else 0
    seconds = stats.model_s * recomputed / max(1, computed)
    return _Loss(
        seconds,
        f"{seconds / run.inference_s:.0%} of the time was spent on recomputing tokens after "
        f"{stats.preemptions} preemptions, because KV memory was full",
    )


def _other_processes(run: FinishedRun) -> _Loss:
    """Return the time in which other processes had the cores of a CPU that computes the model.

    Threads of a GPU's host also wait, but the GPU computes meanwhile.
    """
    seconds = run.stats.cpu_wait_s if run.device.rates is not None else 0.0
    return _Loss(
        seconds,
        f"{seconds / run.inference_s:.0%} of the time other processes used the processor's cores",
    )


def _small_batch(run: FinishedRun) -> list[_Loss]:
    """Return the time that decoding at the largest batch would have saved, by the cost model."""
    stats, max_batch = run.stats, run.max_batch_size
    batch = stats.batch_sum / stats.steps
    if not stats.decode_tokens or batch >= max_batch:
        return []
    context = max(1, round(stats.decode_context / stats.decode_tokens))

    def per_token(size: int) -> float:
        work = Workload("decode", size, 1, context, run.dtype, fused=True)
        return _step_seconds(run, work) / size

    now = per_token(max(1, round(batch)))
    saved = max(0.0, 1 - per_token(max_batch) / now)
    decode_s = stats.decode_tokens * now
    decoding = decode_s / (decode_s + _prefill_seconds(run))
    reasons = {
        "too few requests to fill it": stats.short_steps,
        "KV memory was full": stats.kv_full_steps,
        "new requests waited to be admitted as a group": stats.gathering_steps,
    }
    reason = max(reasons, key=lambda reason: reasons[reason])
    seconds = stats.model_s * decoding * saved
    return [_Loss(seconds, f"the decode batch was {batch:.0f} of {max_batch}: {reason}")]


def _prefill_seconds(run: FinishedRun) -> float:
    """Return the seconds of the chunks of prompts by the cost model."""
    stats = run.stats
    if not stats.prefill_chunks:
        return 0.0
    query = max(1, round(stats.prefill_tokens / stats.prefill_chunks))
    context = max(query, round(stats.prefill_context / stats.prefill_chunks))
    work = Workload("prefill", 1, query, context, run.dtype, fused=True, causal=True)
    # Chunks of several sequences share a step, and what it costs to read the weights.
    chunks = max(1, round(stats.prefill_chunks / stats.steps))
    return _step_seconds(run, replace(work, batch=chunks)) * stats.prefill_chunks / chunks


def _step_seconds(run: FinishedRun, work: Workload) -> float:
    """Return the seconds of a step: at the measured rates of kernels, or the roofline's."""
    found = bound_step(run.config, work, run.device)
    return max(found.compute_s, found.memory_s) if found.measured_s is None else found.measured_s


def _below_peak(run: FinishedRun, limit_s: float) -> list[_Loss]:
    """Return the time of the steps beyond the device's limit: launches, and slow kernels."""
    waited_s = _other_processes(run).seconds
    excess_s = max(0.0, run.stats.model_s - limit_s - waited_s)
    work = Workload("decode", 1, 1, 1, run.dtype)
    launches = total(operations(run.config, work)).launches
    launch_s = min(excess_s, run.stats.launched_steps * launches * run.device.launch_s)
    below_peak_s = excess_s - launch_s
    return [
        _Loss(
            launch_s,
            f"{launch_s / run.inference_s:.0%} of the time was spent on launching {launches:,} "
            "operations per step",
        ),
        _Loss(
            below_peak_s,
            f"{below_peak_s / run.inference_s:.0%} of the time is kernels and sampling running "
            "below peak speed",
        ),
    ]
