"""Time requests with JSON schemas against the same without: `benchmarks/structured.py CHECKPOINT`.

The uniform load of `loads.py`, greedy, alternating in one process. Each request has another schema,
of a list that has more items than its 128 tokens can hold, so that both ways compute as many
tokens. Needs a checkpoint with a tokenizer; its weights may be random. Prints one JSON object.
"""

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: F401, I001  before torch: sets how OpenMP threads wait

import click

from benchmarks.loads import make_load
from engine import Engine, EngineConfig, Grammar, Request, SamplingParams
from tokenizer import Tokenizer


def schema(number: int) -> Grammar:
    """Return the schema of a long list of records, whose names differ by request."""
    record = {
        "type": "object",
        "properties": {
            f"name{number}": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
            "address": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
        "required": [f"name{number}", "age", "tags"],
        "additionalProperties": False,
    }
    return Grammar.json_schema({"type": "array", "items": record, "minItems": 1000})


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--runs", default=3, show_default=True, help="Pairs.")
@click.option("--tokens", default=128, show_default=True, help="Output tokens of each request.")
def main(checkpoint: Path, runs: int, tokens: int) -> None:
    """Print the output tokens per second with and without schemas, and their ratio."""
    prompts, _ = make_load("uniform")
    loads = {
        is_on: [
            Request(
                prompt,
                SamplingParams(
                    max_new_tokens=tokens,
                    ignore_eos=True,
                    grammar=schema(i) if is_on else None,
                ),
            )
            for i, prompt in enumerate(prompts)
        ]
        for is_on in (False, True)
    }
    speeds: dict[bool, list[float]] = {False: [], True: []}
    config = EngineConfig(prefix_cache=False, max_batch_size=len(prompts), speculation=False)
    with Engine(checkpoint, config) as engine:
        engine.tokenizer_json = Tokenizer.load(checkpoint).to_json
        # Records the steps and compiles the schemas.
        for is_on in (False, True):
            short = (
                replace(each, params=replace(each.params, max_new_tokens=3))
                for each in loads[is_on]
            )
            list(engine.generate(short))
        for run in range(2 * runs):
            is_on = bool(run % 2)
            start = time.perf_counter()
            done = list(engine.generate(loads[is_on]))
            seconds = time.perf_counter() - start
            failed = next((c.error for c in done if c.error is not None), None)
            if failed is not None:
                raise click.ClickException(str(failed))
            speeds[is_on].append(sum(len(c.token_ids) for c in done) / seconds)
    without, with_schemas = (statistics.median(speeds[key]) for key in (False, True))
    pairs = [b / a for a, b in zip(speeds[False], speeds[True], strict=True)]
    print(
        json.dumps(
            {
                "with_schemas_tok_s": round(with_schemas, 1),
                "without_tok_s": round(without, 1),
                "ratio": round(statistics.median(pairs), 3),
                "pairs": [round(pair, 3) for pair in pairs],
            }
        )
    )


if __name__ == "__main__":
    main()
