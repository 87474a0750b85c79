"""The report of a job as a dictionary: what `--report` writes."""

import platform
from dataclasses import asdict
from typing import Any

import torch

from engine.memory_plan import is_out_of_memory
from engine.summary import RunSummary
from getp import __version__
from getp.report.efficiency import RunEfficiency, record_efficiency, run_efficiency
from getp.report.measurements import Measurements, quantile
from getp.terminal import warn
from model.cost.workload import kv_dtype

Report = dict[str, Any]
"""Times are in seconds, memory is in bytes; None means "not measured"."""


def job_report(
    measured: Measurements, run: RunSummary, checkpoint: str, price: float | None = None
) -> Report:
    """Return the report of a finished job. price: of a device per hour."""
    stats = run.stats
    counted = run.replicas or run.device_type == "cpu"
    devices = run.device_count if counted else run.tensor_parallel
    replicas = [asdict(replica) for replica in run.replicas]
    return {
        "checkpoint": checkpoint,
        "device": run.device,
        "peak_gpu_memory_bytes": run.peak_gpu_memory_bytes,
        "balance": sum(each["busy"] for each in replicas) / len(replicas) if replicas else None,
        "replicas": replicas or None,
        "tensor_parallel": run.tensor_parallel,
        "dtype": run.dtype,
        "kv_dtype": kv_dtype(run.config, run.dtype),
        "kernels": list(run.kernels),
        "versions": {
            "getp": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "requests_resumed": measured.resumed,
        "requests_done": measured.done,
        "requests_failed": measured.failed,
        "requests_cut": measured.cut,
        "prompts_cut": measured.cut_prompts,
        "requests_ignored": measured.ignored,
        "prompt_tokens": measured.prompt_tokens,
        "cached_tokens": measured.cached_tokens,
        "output_tokens": measured.output_tokens,
        "warm_up_s": measured.warm_up_s,
        "check_s": stats.check_s,
        "load_s": stats.load_s,
        "compile_s": stats.compile_s,
        "capture_s": stats.capture_s,
        "inference_s": measured.inference_s,
        "finish_s": measured.finish_s,
        "output_tok_s": measured.output_tok_s,
        "total_tok_s": measured.total_tok_s,
        "ttft_median_s": quantile(measured.ttft_s.values, 0.5),
        "ttft_p99_s": quantile(measured.ttft_s.values, 0.99),
        "per_token_median_s": quantile(measured.per_token_s.values, 0.5),
        "per_token_p99_s": quantile(measured.per_token_s.values, 0.99),
        "steps": stats.steps,
        "mean_batch": _ratio(stats.batch_sum, stats.steps),
        "peak_batch": stats.peak_batch,
        "preemptions": stats.preemptions,
        "draft_tokens": stats.draft_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "back_offs": stats.back_offs,
        "kv_bytes": stats.kv_bytes,
        "peak_kv_use": _ratio(stats.peak_kv_blocks, stats.kv_blocks),
        "prefix_hit_rate": _ratio(measured.cached_tokens, measured.prompt_tokens),
        **asdict(_efficiency(measured, run, checkpoint)),
        "peak_memory_bytes": run.peak_memory_bytes,
        "cost": None if price is None else price * devices * measured.total_s / 3600,
    }


def _efficiency(measured: Measurements, run: RunSummary, checkpoint: str) -> RunEfficiency:
    """Return the efficiency of the run, and record it for later predictions.

    If memory is too scarce to measure the peaks of this machine, the result is empty.
    """
    try:
        efficiency = run_efficiency(run, measured.inference_s, measured.done)
        record_efficiency(run, checkpoint, efficiency, measured.inference_s)
        return efficiency
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        warn(
            "not enough free memory to measure the peak speed of this machine; the report does not "
            "state the efficiency"
        )
        return RunEfficiency()


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
