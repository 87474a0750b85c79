"""The report of a job as a table for users, and its last line for scripts."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from getp.report.job_report import Report
from getp.report.measurements import Measurements
from getp.terminal import strip_control_characters
from getp.units import counted, memory


def final_line(measured: Measurements) -> str:
    """Return the last line of a job, in the form that scripts expect."""
    return (
        f"elapsed time(s): {measured.inference_s:.6f}, "
        f"achieved throughput TPS (tok/s): {measured.output_tok_s:.6f}"
    )


def print_report(report: Report, details: bool = False) -> None:
    """Print the report as a table on standard error, apart from output for scripts."""
    title = f"getp on {escape(strip_control_characters(report['checkpoint']))}"
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in report_rows(report, details):
        table.add_row(name, escape(value))
    Console(stderr=True).print(table)


def report_rows(report: Report, details: bool) -> list[tuple[str, str]]:
    """Return the rows of the report as plain text, each with its name."""
    return [*_answer(report, details), *(_details(report) if details else [])]


def _answer(r: Report, details: bool) -> list[tuple[str, str]]:
    """Return the rows that are always shown, the result of the job first."""
    ranks = f", tensor parallel over {r['tensor_parallel']}" if r["tensor_parallel"] > 1 else ""
    cut = f" ({r['requests_cut']:,} truncated at the length limit)" if r["requests_cut"] else ""
    requests = f"{r['requests_done']:,} done{cut}, {r['requests_failed']:,} failed"
    if r["requests_resumed"]:
        requests += f" (and {r['requests_resumed']:,} finished by an earlier run)"
    if r["requests_ignored"]:
        lines = counted(r["requests_ignored"], "line")
        requests += f"; {lines} after the announced prompts ignored"
    return [
        ("requests", requests),
        (
            "throughput",
            f"{r['output_tok_s']:,.1f} output tok/s, {r['total_tok_s']:,.1f} with prompts",
        ),
        ("time", f"inference {r['inference_s']:.2f} s, warm-up {r['warm_up_s']:.2f} s"),
        (
            "tokens",
            f"{r['prompt_tokens']:,} prompt ({r['cached_tokens']:,} cached, "
            f"{r['prefix_hit_rate']:.1%}), {r['output_tokens']:,} output",
        ),
        ("time to first token", _latency(r["ttft_median_s"], r["ttft_p99_s"])),
        ("time per output token", _latency(r["per_token_median_s"], r["per_token_p99_s"])),
        *_efficiency(r, details),
        *_replicas(r),
        *_cost(r),
        ("device", f"{r['device']}{ranks}, {r['dtype']}"),
        *([("kernels", "\n".join(r["kernels"]))] if r["kernels"] else []),
    ]


def _cost(r: Report) -> list[tuple[str, str]]:
    if r.get("cost") is None:
        return []
    each = f", {r['cost'] / r['output_tokens'] * 1e6:,.2f} per million output tokens"
    return [("cost", f"{r['cost']:,.4f}{each if r['output_tokens'] else ''}")]


def _details(r: Report) -> list[tuple[str, str]]:
    parts = {
        "kernel checks": r["check_s"],
        "load": r["load_s"],
        "compile": r["compile_s"],
        "capture": r["capture_s"],
    }
    peak = memory(r["peak_memory_bytes"])
    if r["peak_gpu_memory_bytes"] is not None:
        peak += f", on the GPU {memory(r['peak_gpu_memory_bytes'])}"
    # On a CPU nothing is checked, compiled or captured.
    shown = {name: s for name, s in parts.items() if s >= 0.005 or name == "load"}
    return [
        ("warm-up", ", ".join(f"{name} {s:.2f} s" for name, s in shown.items())),
        ("finish", f"{r['finish_s']:.2f} s"),
        (
            "batch",
            f"mean {r['mean_batch']:.1f}, peak {r['peak_batch']} over "
            f"{counted(r['steps'], 'step')}",
        ),
        (
            "KV cache",
            f"{memory(r['kv_bytes'])} in {r['kv_dtype']}, peak use {r['peak_kv_use']:.1%}, "
            f"{counted(r['preemptions'], 'preemption')}",
        ),
        *_speculation(r),
        ("peak memory", peak),
        *map(_replica, r["replicas"] or ()),
        ("versions", ", ".join(f"{name} {version}" for name, version in r["versions"].items())),
    ]


def _speculation(r: Report) -> list[tuple[str, str]]:
    drafted, accepted = r["draft_tokens"], r["accepted_tokens"]
    if not drafted:
        return []
    return [("speculation", f"{accepted:,} of {counted(drafted, 'draft token')} accepted")]


def _efficiency(r: Report, details: bool) -> list[tuple[str, str]]:
    if r["limit_share"] is None:
        return []
    device = r["peaks"].split(": ")[0]
    kind = "measured" if device.endswith("local") else "datasheet"
    share = (
        f"{r['limit_share']:.1%} of the {kind} peak of {device.replace('local', 'this machine')} "
        f"({r['bound']}-bound)"
    )
    if kind == "measured" and r["limit_share"] > 1:
        share += (
            "; above 100%: the data was in caches, or the peak was measured on a busy machine "
            "(again: -m plan --gpu local --measure)"
        )
    # The utilization of what bounds the run is the share itself.
    other = f"MBU {r['mbu']:.1%}" if r["bound"] == "compute" else f"MFU {r['mfu']:.1%}"
    return [
        ("efficiency", f"{share}; {other}" if details else share),
        ("largest loss", r["largest_loss"]),
    ]


def _replicas(r: Report) -> list[tuple[str, str]]:
    if r["replicas"] is None:
        return []
    died = [f"replica {one['replica']} {_died(one)}" for one in r["replicas"] if one["deaths"]]
    busy = f"{len(r['replicas']):,}, busy for {r['balance']:.1%} of the time"
    return [("replicas", "; ".join([busy, *died]))]


def _replica(one: Report) -> tuple[str, str]:
    figures = (
        f"{counted(one['requests'], 'request')}, {one['output_tokens']:,} output tokens, "
        f"{one['output_tok_s']:,.1f} tok/s, batch {one['mean_batch']:.1f}, busy "
        f"{one['busy']:.1%}, {memory(one['peak_memory_bytes'])} on {one['host']}"
    )
    return f"replica {one['replica']}", f"{figures}; {_died(one)}" if one["deaths"] else figures


def _died(one: Report) -> str:
    times = "once" if one["deaths"] == 1 else f"{one['deaths']} times"
    return f"died {times}, requests reassigned: {one['requests_left_to_others']:,}"


def _latency(median: float | None, p99: float | None) -> str:
    if median is None or p99 is None:
        return "not measured"
    return f"median {median * 1e3:,.1f} ms, 99th percentile {p99 * 1e3:,.1f} ms"
