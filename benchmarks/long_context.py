"""Time prompts and contexts by their length: `python benchmarks/long_context.py CHECKPOINT`.

Prefill: prompts of each length, alone: tokens a second, and the share of attention in a second run
with every part timed. Decode: requests at each length of context, all over the same context, which
is put into the prefix cache with random contents instead of computing it. `--requests 64` shows
what shared prefixes cost. Prints a table, then one JSON object as the last line.
"""

import json
import random
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: F401, I001  before torch: sets how OpenMP threads wait

import click
from rich.console import Console
from rich.table import Table

from engine import Engine, EngineConfig, Request, SamplingParams
from model.ops.kv_values import random_kv
from model.ops.step_parts import observe

_OWN_TOKENS = 16  # of a prompt, behind the shared context


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False))
@click.option("--prompts", default="2000,8000", show_default=True, help="Prefill lengths.")
@click.option("--contexts", default="4000,16000", show_default=True, help="Decode contexts.")
@click.option("--requests", default=1, show_default=True, help="Requests over each context.")
@click.option("--steps", default=24, show_default=True, help="Timed decode steps.")
@click.option("--repeats", default=3, show_default=True, help="Runs, of which the fastest counts.")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--kv-dtype", default="auto", show_default=True, help="Dtype of the KV cache.")
@click.option("--dummy-weights", is_flag=True, help="Random weights from config.json alone.")
def main(
    checkpoint: str,
    prompts: str,
    contexts: str,
    requests: int,
    steps: int,
    repeats: int,
    dtype: str,
    kv_dtype: str,
    dummy_weights: bool,
) -> None:
    """Print prefill and decode tokens a second."""
    lengths, depths = (
        [int(length) for length in text.split(",") if length] for text in (prompts, contexts)
    )
    config = EngineConfig(
        dtype=dtype,
        kv_dtype=kv_dtype,
        dummy_weights=dummy_weights,
        max_batch_size=requests,
        speculation=False,  # random weights repeat themselves, which text does not
    )
    figures: dict[str, dict[str, float]] = {}
    loads: dict[str, tuple[list[list[int]], int]] = {}  # prompts and the tokens of each
    with Engine(checkpoint, config) as engine:
        generate(engine, [prompt_of(32, 0)], 4)
        for length in lengths:
            name, times = f"prefill {length}", []
            for run in range(repeats):
                loads[name] = [prompt_of(length, run)], 1
                times.append(generate(engine, *loads[name]))
            figures[name] = {"tok_s": length / min(times)}
            loads[name] = [prompt_of(length, repeats)], 1
        for depth in depths:
            context = prompt_of(depth, -1)
            cache_context(engine, context)
            own = [context + prompt_of(_OWN_TOKENS, i) for i in range(requests)]
            generate(engine, own, 1)
            seconds = min(
                generate(engine, own, 1 + steps) - generate(engine, own, 1) for _ in range(repeats)
            )
            name = f"decode {requests} at {depth}"
            figures[name] = {"tok_s": requests * steps / seconds, "step_ms": seconds / steps * 1e3}
            loads[name] = own, 1 + steps
        engine.runner.uncapture()
        for name, load in loads.items():
            figures[name]["attention"] = attention_share(engine, *load)
    table = Table("load", "tok/s", "attention")
    for name, figure in figures.items():
        table.add_row(name, f"{figure['tok_s']:.1f}", f"{figure['attention']:.1%}")
    Console().print(table)
    print(json.dumps({"checkpoint": Path(checkpoint).name, "requests": requests, **figures}))


def prompt_of(length: int, seed: int) -> list[int]:
    """Random token ids."""
    return random.Random(seed).choices(range(3, 16_000), k=length)


def generate(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    """Generate `tokens` for each prompt and return the seconds."""
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    list(engine.generate([Request(prompt, params) for prompt in prompts]))
    return time.perf_counter() - start


def attention_share(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    """Generate again and return attention's share of the time, by parts of the steps."""
    spent: dict[str, float] = defaultdict(float)
    current, since = "", time.perf_counter()

    def switch(name: str) -> None:
        nonlocal current, since
        now = time.perf_counter()
        spent[current] += now - since
        current, since = name, now

    with observe(switch):
        generate(engine, prompts, tokens)
    switch("")
    return spent["attention"] / sum(spent.values())


def cache_context(engine: Engine, tokens: list[int]) -> None:
    """Put a prompt into the prefix cache, with random keys and values."""
    cache = engine.steps.scheduler.cache
    tables = cache.new_tables()
    if not cache.allocate(tables, 0, len(tokens)):
        raise click.UsageError(f"the KV cache has no room for a context of {len(tokens)}")
    for kv in engine.runner.kv_caches:
        for table in tables.tables:
            for block in table:
                kv[:, block] = random_kv(kv)
    cache.index_full_blocks(tables, tokens, len(tokens))
    cache.release(tables)


if __name__ == "__main__":
    main()
