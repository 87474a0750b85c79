"""The largest loss of time in a run, as a clause for the report."""

from dataclasses import dataclass

from engine import EngineStats
from model.config import ModelConfig
from model.cost.devices import Device
from model.cost.operations import operations, total
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


def _small_batch(run: FinishedRun) -> list[_Loss]:
    """Return the time that decoding at the largest batch would have saved, by the cost model."""
    stats, max_batch = run.stats, run.max_batch_size
    batch = stats.batch_sum / stats.steps
    if not stats.decode_tokens or batch >= max_batch:
        return []
    context = max(1, round(stats.decode_context / stats.decode_tokens))

    def per_token(size: int) -> float:
        work = Workload("decode", size, 1, context, run.dtype, fused=True)
        step = total(operations(run.config, work))
        compute = step.flops.matrix / run.device.peak(run.dtype)
        return max(compute, step.bytes.total / run.device.bandwidth) / size

    saved = 1 - per_token(max_batch) / per_token(max(1, round(batch)))
    decoding = stats.decode_tokens / (stats.decode_tokens + stats.prefill_tokens)
    reasons = {
        "too few requests to fill it": stats.short_steps,
        "KV memory was full": stats.kv_full_steps,
        "new requests waited to be admitted as a group": stats.gathering_steps,
    }
    reason = max(reasons, key=lambda reason: reasons[reason])
    seconds = stats.model_s * decoding * saved
    return [_Loss(seconds, f"the decode batch was {batch:.0f} of {max_batch}: {reason}")]


def _below_peak(run: FinishedRun, limit_s: float) -> list[_Loss]:
    """Return the time of the steps beyond the device's limit: launches, and slow kernels."""
    excess_s = max(0.0, run.stats.model_s - limit_s)
    work = Workload("decode", 1, 1, 1, run.dtype)
    launches = total(operations(run.config, work)).launches
    launch_s = min(excess_s, run.stats.steps * launches * run.device.launch_s)
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
