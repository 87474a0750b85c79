"""The throughput report of a job: a table to read and JSON to keep."""

import math
import platform
import resource
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engine import Completion
from engine.memory_plan import is_out_of_memory
from getp import __version__
from getp.report.efficiency import Explanation, as_report, explain, remember
from getp.terminal import say, visible

if TYPE_CHECKING:
    from engine import Engine
    from getp.cluster.driver import Cluster

Report = dict[str, Any]
"""What `--report` writes. Times are in seconds, memory in bytes; None is "not measured"."""


class Sample:
    """Numbers of which only evenly spaced ones are kept once there are many: flat memory."""

    def __init__(self, most: int = 1 << 16) -> None:
        self.values = array("d")
        self._most = most
        self._step, self._skipped = 1, 0

    def add(self, value: float) -> None:
        """Keep a number, or skip it."""
        self._skipped += 1
        if self._skipped < self._step:
            return
        self._skipped = 0
        self.values.append(value)
        if len(self.values) == self._most:
            self.values = self.values[1::2]
            self._step *= 2


@dataclass
class Measurements:
    """What the completions of a job add up to, kept small for jobs of millions."""

    resumed: int = 0  # requests that an earlier run had finished; they count nowhere else
    done: int = 0
    failed: int = 0
    cut: int = 0  # of those done, ended by a limit on their length
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    warm_up_s: float = 0.0
    inference_s: float = 0.0
    finish_s: float = 0.0
    _ttft_s: Sample = field(default_factory=Sample)  # time to the first token
    _per_token_s: Sample = field(default_factory=Sample)  # between tokens, a mean each

    @property
    def output_tok_s(self) -> float:
        """Output tokens over the seconds of inference: the number a job is judged by."""
        return self._rate(self.output_tokens)

    def add(self, completion: Completion) -> None:
        """Count a request that succeeded."""
        tokens = len(completion.token_ids)
        self.done += 1
        self.cut += completion.finish_reason == "length"
        self.prompt_tokens += completion.prompt_tokens
        self.cached_tokens += completion.cached_tokens
        self.output_tokens += tokens
        if tokens:
            self._ttft_s.add(completion.first_token - completion.arrived)
        if tokens > 1:
            decoding = completion.finished - completion.first_token
            self._per_token_s.add(decoding / (tokens - 1))

    def report(self, engine: "Engine | Cluster", checkpoint: str) -> Report:
        """Put everything together, after the engine has finished."""
        from getp.report.replicas import Cluster, replicas_report

        # The peaks of memory before the machine is measured to explain.
        stats, peak = engine.stats, peak_memory()
        if isinstance(engine, Cluster):
            where = replicas_report(engine, self.inference_s)
        else:
            where = _one_engine(engine.device)
        explanation = self._explained(engine, checkpoint)
        return {
            "checkpoint": checkpoint,
            **where,
            "tensor_parallel": engine.tensor_parallel,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "versions": {
                "getp": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "requests_resumed": self.resumed,
            "requests_done": self.done,
            "requests_failed": self.failed,
            "requests_cut": self.cut,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "warm_up_s": self.warm_up_s,
            "load_s": stats.load_s,
            "compile_s": stats.compile_s,
            "capture_s": stats.capture_s,
            "inference_s": self.inference_s,
            "finish_s": self.finish_s,
            "output_tok_s": self.output_tok_s,
            "total_tok_s": self._rate(self.prompt_tokens + self.output_tokens),
            "ttft_median_s": quantile(self._ttft_s.values, 0.5),
            "ttft_p99_s": quantile(self._ttft_s.values, 0.99),
            "per_token_median_s": quantile(self._per_token_s.values, 0.5),
            "per_token_p99_s": quantile(self._per_token_s.values, 0.99),
            "steps": stats.steps,
            "mean_batch": _ratio(stats.batch_sum, stats.steps),
            "peak_batch": stats.peak_batch,
            "preemptions": stats.preemptions,
            "back_offs": stats.back_offs,
            "kv_bytes": stats.kv_bytes,
            "peak_kv_use": _ratio(stats.peak_kv_blocks, stats.kv_blocks),
            "prefix_hit_rate": _ratio(self.cached_tokens, self.prompt_tokens),
            **as_report(explanation),
            "peak_memory_bytes": peak,
        }

    def _explained(self, engine: "Engine | Cluster", checkpoint: str) -> Explanation:
        """Explain the run, and remember what an engine reached.

        Without peaks if others have the memory to measure them in.
        """
        from getp.report.replicas import Cluster, explain_replicas

        try:
            if isinstance(engine, Cluster):
                return explain_replicas(engine, self.inference_s, self.done)
            found = explain(engine, self.inference_s, self.done)
            remember(engine, checkpoint, found, self.inference_s)
            return found
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            say(
                "getp: warning: no memory is free to measure what this machine can do; "
                "the report does not say how close to it the job was"
            )
            return Explanation()

    def _rate(self, tokens: int) -> float:
        return tokens / self.inference_s if self.inference_s > 0 else 0.0


def _one_engine(device: torch.device) -> Report:
    """Return the part of the report that is another one with replicas."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "balance": None,
        "replicas": None,
    }


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest value that at least `share` of all do not exceed; None without any."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def final_line(measured: Measurements) -> str:
    """Return the last line of a job, as the original prints it for scripts."""
    return (
        f"elapsed time(s): {measured.inference_s:.6f}, "
        f"achieved throughput TPS (tok/s): {measured.output_tok_s:.6f}"
    )


def print_report(report: Report) -> None:
    """Print the report as a table on standard error, where it disturbs no script."""
    title = f"getp on {escape(visible(report['checkpoint']))}"
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in _rows(report):
        table.add_row(name, value)
    Console(stderr=True).print(table)


def _rows(r: Report) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items())
    memory = _size(r["peak_memory_bytes"])
    if r["peak_gpu_memory_bytes"] is not None:
        memory += f", on the GPU {_size(r['peak_gpu_memory_bytes'])}"
    ranks = f", tensor parallel over {r['tensor_parallel']}" if r["tensor_parallel"] > 1 else ""
    cut = f" ({r['requests_cut']:,} cut at a limit of length)" if r["requests_cut"] else ""
    requests = f"{r['requests_done']:,} done{cut}, {r['requests_failed']:,} failed"
    if r["requests_resumed"]:
        requests += f" (and {r['requests_resumed']:,} ended in an earlier run)"
    return [
        ("requests", requests),
        (
            "tokens",
            f"{r['prompt_tokens']:,} prompt ({r['cached_tokens']:,} cached, "
            f"{r['prefix_hit_rate']:.1%}), {r['output_tokens']:,} output",
        ),
        (
            "time",
            f"warm-up {r['warm_up_s']:.2f} s ({_starting(r)}), "
            f"inference {r['inference_s']:.2f} s, finish {r['finish_s']:.2f} s",
        ),
        (
            "throughput",
            f"{r['output_tok_s']:,.1f} output tok/s, {r['total_tok_s']:,.1f} with prompts",
        ),
        ("first token", _latency(r["ttft_median_s"], r["ttft_p99_s"])),
        ("each further token", _latency(r["per_token_median_s"], r["per_token_p99_s"])),
        ("batch", f"mean {r['mean_batch']:.1f}, peak {r['peak_batch']} over {r['steps']:,} steps"),
        (
            "KV cache",
            f"{_size(r['kv_bytes'])}, peak use {r['peak_kv_use']:.1%}, "
            f"{r['preemptions']:,} preemptions",
        ),
        *_efficiency(r),
        *_replicas(r),
        ("peak memory", memory),
        ("run on", f"{r['device']}{ranks}, {r['dtype']}; {versions}"),
    ]


def _starting(r: Report) -> str:
    """What the warm-up went to; nothing is compiled or captured on a CPU."""
    parts = {"load": r["load_s"], "compile": r["compile_s"], "capture": r["capture_s"]}
    return ", ".join(f"{n} {s:.2f}" for n, s in parts.items() if s or n == "load")


def _efficiency(r: Report) -> list[tuple[str, str]]:
    if r["limit_share"] is None:
        return []
    return [
        (
            "efficiency",
            f"{r['limit_share']:.1%} of what the device can do, bound by {r['bound']}; "
            f"MFU {r['mfu']:.1%}, MBU {r['mbu']:.1%} ({r['peaks']})",
        ),
        ("largest loss", r["largest_loss"]),
    ]


def _replicas(r: Report) -> list[tuple[str, str]]:
    if r["replicas"] is None:
        return []
    rows = [("balance", f"replicas had requests {r['balance']:.1%} of the time")]
    for one in r["replicas"]:
        deaths = ""
        if one["deaths"]:
            deaths = (
                f"; died {one['deaths']} times, left {one['requests_left_to_others']:,} requests "
                "to others"
            )
        rows.append(
            (
                f"replica {one['replica']}",
                f"{one['requests']:,} requests, {one['output_tokens']:,} output tokens, "
                f"{one['output_tok_s']:,.1f} tok/s, batch {one['mean_batch']:.1f}, busy "
                f"{one['busy']:.1%}, {_size(one['peak_memory_bytes'])} on {one['host']}{deaths}",
            )
        )
    return rows


def _latency(median: float | None, p99: float | None) -> str:
    if median is None or p99 is None:
        return "not measured"
    return f"median {median * 1e3:,.1f} ms, 99th percentile {p99 * 1e3:,.1f} ms"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def peak_memory() -> int:
    """Return the most memory the process ever had resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
