"""Time one load on a checkpoint: `python benchmarks/throughput.py CHECKPOINT --load ragged`.

Prints tables, then one JSON object as the last line. Start-up (loading, packing, a first small
request) is not timed, for this engine as for the others. The requests run in a job's order (`-m
getp --schedule`: the longest possible outputs first). The result includes the share of the
machine's own limits, measured in the same run, and a breakdown of the time by part; for the
breakdown the load runs a second time, with every part timed and without replayed decode steps.
"""

import json
import platform
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: F401, I001  before torch: sets how OpenMP threads wait

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.loads import Load, make_load
from engine import Engine, EngineConfig, EngineStats, Request, SamplingParams
from engine.resolve import dtype_name
from getp.report.efficiency import run_cost
from getp.job.ordering import Schedule, order_for_throughput
from getp.job.formats.interface import JobRequest
from model.cost import measure
from model.ops.step_parts import observe

# The group of each part in the breakdown; other parts belong to "everything else".
_GROUPS = {
    "qkv_proj": "GEMMs",
    "o_proj": "GEMMs",
    "attention": "attention",
    "rope": "attention",
    "router": "experts",
    "lm_head": "head",
    "sampling": "sampling",
    "scheduling": "scheduling",
    "batch_preparation": "scheduling",
}


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False))
@click.option("--load", "kind", type=click.Choice(get_args(Load)), required=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--quantize", help="int8, int4 or fp8: convert the weights as they are loaded.")
@click.option("--prefix-cache/--no-prefix-cache", default=False, show_default=True)
@click.option("--dummy-weights", is_flag=True, help="Random weights from config.json alone.")
@click.option(
    "--schedule", type=click.Choice(get_args(Schedule)), default="throughput", show_default=True
)
@click.option(
    "--parts/--no-parts", default=True, show_default=True, help="Print the breakdown by part."
)
def main(
    checkpoint: str,
    kind: Load,
    dtype: str,
    device: str,
    quantize: str | None,
    prefix_cache: bool,
    dummy_weights: bool,
    schedule: Schedule,
    parts: bool,
) -> None:
    """Run a load and print output tokens per second."""
    load = make_load(kind)
    start = time.perf_counter()
    config = EngineConfig(
        dtype=dtype,
        device=device,
        quantize=quantize,
        prefix_cache=prefix_cache,
        dummy_weights=dummy_weights,
        max_batch_size=1 if kind == "single" else None,  # as for a prompt on the command line
        speculation=False,  # random weights repeat themselves, which text does not
    )
    with Engine(checkpoint, config) as engine:
        warm = SamplingParams(max_new_tokens=4, ignore_eos=True)
        list(engine.generate([Request(load[0][0], warm)]))
        start_up = time.perf_counter() - start
        before = replace(engine.stats)
        requests = ordered_requests(*load, schedule)
        start = time.perf_counter()
        done = list(engine.generate(requests))
        seconds = time.perf_counter() - start
        stats = engine.stats.since(before)
        peaks = measure.measure(engine.device)
        shares = breakdown(engine, requests) if parts else {}
    result: dict[str, object] = {
        "load": kind,
        "schedule": schedule,
        "checkpoint": Path(checkpoint).name,
        "dtype": dtype_name(engine.dtype),
        "quantize": quantize,
        "start_up_s": round(start_up, 2),
        "output_tokens": sum(len(completion.token_ids) for completion in done),
        **figures(engine, stats, peaks, seconds),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    print_result(result, shares, stats.steps)


def ordered_requests(
    prompts: list[list[int]], outputs: list[int], schedule: Schedule
) -> list[Request]:
    """Return the requests of a load in the order in which a job runs them."""
    tasks = [
        JobRequest(i, i + 1, str(i), prompt, SamplingParams(max_new_tokens=count, ignore_eos=True))
        for i, (prompt, count) in enumerate(zip(prompts, outputs, strict=True))
    ]
    ordered = order_for_throughput(tasks) if schedule == "throughput" else tasks
    return [
        Request(task.prompt_ids, task.params, task.index)
        for task in ordered
        if isinstance(task, JobRequest)
    ]


def figures(
    engine: Engine, stats: EngineStats, peaks: dict[str, Any], seconds: float
) -> dict[str, object]:
    """Return the rates of a run and its shares of the limits in `peaks` (`measure.measure`)."""
    name = dtype_name(engine.dtype)
    cost = run_cost(engine.held_config, name, stats)
    compute = cost.flops.matrix / peaks["peaks"][name]
    memory = cost.bytes.total / peaks["bandwidth"]
    return {
        "seconds": round(seconds, 3),
        "tok_s": round(stats.output_tokens / seconds, 1),
        "gemm_peak_gflop_s": round(peaks["peaks"][name] / 1e9),
        "read_bandwidth_gb_s": round(peaks["bandwidth"] / 1e9, 1),
        "of_gemm_peak": round(compute / seconds, 3),
        "of_bandwidth": round(memory / seconds, 3),
        # Prefill is bound by compute and decoding by memory, so the times are added.
        "of_limit": round((compute + memory) / seconds, 3),
        "steps": stats.steps,
        "mean_batch": round(stats.batch_sum / stats.steps, 1),
        "preemptions": stats.preemptions,
    }


def print_result(result: dict[str, object], shares: dict[str, float], steps: int) -> None:
    """Print the tables, then the JSON line. shares: seconds by group of parts, or empty."""
    table = Table("figure", "value", title=f"{result['checkpoint']}, {result['load']}")
    for figure, value in result.items():
        table.add_row(figure, str(value))
    console = Console()
    console.print(table)
    if shares:
        table = Table("part of a step", "share", "ms", title="breakdown of the time")
        for group, spent in sorted(shares.items(), key=lambda pair: -pair[1]):
            share = spent / sum(shares.values())
            table.add_row(group, f"{share:.1%}", f"{spent / steps * 1e3:.2f}")
        console.print(table)
        result["breakdown"] = {g: round(s / sum(shares.values()), 4) for g, s in shares.items()}
    print(json.dumps(result))


def breakdown(engine: Engine, requests: list[Request]) -> dict[str, float]:
    """Run the requests again and return the seconds that each group of parts takes."""
    engine.runner.uncapture()
    sparse = engine.model_config.moe is not None
    spent: dict[str, float] = defaultdict(float)
    current, since = "everything else", time.perf_counter()

    def switch(name: str) -> None:
        nonlocal current, since
        now = time.perf_counter()
        spent[current] += now - since
        since = now
        if name in ("gate_up_proj", "activation", "down_proj"):
            current = "experts" if sparse else "GEMMs"
        else:
            current = _GROUPS.get(name, "everything else")

    with observe(switch):
        list(engine.generate(requests))
    switch("other")
    return spent


if __name__ == "__main__":
    main()
