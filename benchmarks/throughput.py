"""Time one load on a checkpoint: `python benchmarks/throughput.py CHECKPOINT --load ragged`.

Prints a table, then one JSON object as its last line. Start-up (loading, packing, a first small
request) is outside the time, as it is for the other engines.
"""

import json
import platform
import sys
import time
from pathlib import Path
from typing import get_args

import click
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.loads import Load, make_load
from engine import Engine, Request, SamplingParams


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False))
@click.option("--load", "kind", type=click.Choice(get_args(Load)), required=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--prefix-cache/--no-prefix-cache", default=False, show_default=True)
@click.option("--dummy-weights", is_flag=True, help="Random weights from config.json alone.")
def main(
    checkpoint: str, kind: Load, dtype: str, device: str, prefix_cache: bool, dummy_weights: bool
) -> None:
    """Run a load and print output tokens a second."""
    prompts, outputs = make_load(kind)
    start = time.perf_counter()
    engine = Engine(
        checkpoint,
        dtype=dtype,
        device=device,
        prefix_cache=prefix_cache,
        dummy_weights=dummy_weights,
    )
    with engine:
        warm = SamplingParams(max_new_tokens=4, ignore_eos=True)
        list(engine.generate([Request(prompts[0], warm)]))
        start_up = time.perf_counter() - start
        before = engine.stats.steps, engine.stats.batch_sum
        requests = [
            Request(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True), i)
            for i, (prompt, count) in enumerate(zip(prompts, outputs, strict=True))
        ]
        start = time.perf_counter()
        done = list(engine.generate(requests))
        seconds = time.perf_counter() - start
    tokens = sum(len(completion.token_ids) for completion in done)
    steps = engine.stats.steps - before[0]
    result = {
        "load": kind,
        "checkpoint": Path(checkpoint).name,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "start_up_s": round(start_up, 2),
        "output_tokens": tokens,
        "seconds": round(seconds, 3),
        "tok_s": round(tokens / seconds, 1),
        "steps": steps,
        "mean_batch": round((engine.stats.batch_sum - before[1]) / steps, 1),
        "preemptions": engine.stats.preemptions,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    table = Table("figure", "value", title=f"{result['checkpoint']}, {kind}")
    for name, value in result.items():
        table.add_row(name, str(value))
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
