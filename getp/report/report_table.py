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


def print_report(report: Report) -> None:
    """Print the report as a table on standard error, apart from output for scripts."""
    title = f"getp on {escape(strip_control_characters(report['checkpoint']))}"
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in _rows(report):
        table.add_row(name, value)
    Console(stderr=True).print(table)


def _rows(r: Report) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items())
    peak = memory(r["peak_memory_bytes"])
    if r["peak_gpu_memory_bytes"] is not None:
        peak += f", on the GPU {memory(r['peak_gpu_memory_bytes'])}"
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
            "tokens",
            f"{r['prompt_tokens']:,} prompt ({r['cached_tokens']:,} cached, "
            f"{r['prefix_hit_rate']:.1%}), {r['output_tokens']:,} output",
        ),
        (
            "time",
            f"warm-up {r['warm_up_s']:.2f} s ({_warm_up(r)}), "
            f"inference {r['inference_s']:.2f} s, finish {r['finish_s']:.2f} s",
        ),
        (
            "throughput",
            f"{r['output_tok_s']:,.1f} output tok/s, {r['total_tok_s']:,.1f} with prompts",
        ),
        ("time to first token", _latency(r["ttft_median_s"], r["ttft_p99_s"])),
        ("time per output token", _latency(r["per_token_median_s"], r["per_token_p99_s"])),
        (
            "batch",
            f"mean {r['mean_batch']:.1f}, peak {r['peak_batch']} over "
            f"{counted(r['steps'], 'step')}",
        ),
        (
            "KV cache",
            f"{memory(r['kv_bytes'])}, peak use {r['peak_kv_use']:.1%}, "
            f"{counted(r['preemptions'], 'preemption')}",
        ),
        *_efficiency(r),
        *_replicas(r),
        ("peak memory", peak),
        ("device", f"{r['device']}{ranks}, {r['dtype']}; {versions}"),
    ]


def _warm_up(r: Report) -> str:
    """Return the parts of the warm-up; on a CPU nothing is compiled or captured."""
    parts = {"load": r["load_s"], "compile": r["compile_s"], "capture": r["capture_s"]}
    return ", ".join(f"{n} {s:.2f}" for n, s in parts.items() if s or n == "load")


def _efficiency(r: Report) -> list[tuple[str, str]]:
    if r["limit_share"] is None:
        return []
    device = r["peaks"].split(": ")[0]
    kind = "measured" if device.endswith("local") else "datasheet"
    return [
        (
            "efficiency",
            f"{r['limit_share']:.1%} of the {kind} peak of "
            f"{device.replace('local', 'this machine')} ({r['bound']}-bound); "
            f"MFU {r['mfu']:.1%}, MBU {r['mbu']:.1%}",
        ),
        ("largest loss", r["largest_loss"]),
    ]


def _replicas(r: Report) -> list[tuple[str, str]]:
    if r["replicas"] is None:
        return []
    rows = [("balance", f"replicas had requests for {r['balance']:.1%} of the time")]
    for one in r["replicas"]:
        deaths = ""
        if one["deaths"]:
            times = "once" if one["deaths"] == 1 else f"{one['deaths']} times"
            deaths = f"; died {times}, requests reassigned: {one['requests_left_to_others']:,}"
        rows.append(
            (
                f"replica {one['replica']}",
                f"{counted(one['requests'], 'request')}, {one['output_tokens']:,} output tokens, "
                f"{one['output_tok_s']:,.1f} tok/s, batch {one['mean_batch']:.1f}, busy "
                f"{one['busy']:.1%}, {memory(one['peak_memory_bytes'])} on {one['host']}{deaths}",
            )
        )
    return rows


def _latency(median: float | None, p99: float | None) -> str:
    if median is None or p99 is None:
        return "not measured"
    return f"median {median * 1e3:,.1f} ms, 99th percentile {p99 * 1e3:,.1f} ms"
