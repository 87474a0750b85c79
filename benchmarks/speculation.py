"""Time single requests with and without speculation: `python benchmarks/speculation.py CHECKPOINT`.

Two prompts, alternating in one process. The first asks to repeat a text, as requests to correct,
translate or quote one do; the second is answered from random token ids, sampled at a high
temperature, so that nothing repeats. Needs a checkpoint with trained weights. The results of each
pair must be equal. Prints one JSON object.
"""

import json
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: F401, I001  before torch: sets how OpenMP threads wait

import click

from engine import Engine, EngineConfig, Request, SamplingParams
from getp.text.prompts import encode_prompt
from tokenizer import Tokenizer

_TEXT = """The lighthouse keeper wrote the same words every evening: the lamp is lit, the sea is \
calm, the boats are home. On the third of March he wrote: the lamp is lit, the sea is rough, two \
boats are missing. In the morning both boats lay in the harbour, their nets full of silver fish."""


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--runs", default=7, show_default=True, help="Pairs of each prompt.")
@click.option("--tokens", default=96, show_default=True, help="Output tokens of each request.")
def main(checkpoint: Path, runs: int, tokens: int) -> None:
    """Print the tokens a second of both prompts with and without speculation, and their ratio."""
    question = f"Repeat this text exactly, twice, without any comment:\n\n{_TEXT}"
    tokenizer = Tokenizer.load(checkpoint)
    prompt = encode_prompt(tokenizer, question, tokenizer.template is not None, None)
    plain = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    requests = {
        "repeats its prompt": Request(prompt, plain),
        "repeats nothing": Request(
            random.Random(0).choices(range(1000), k=128),
            replace(plain, temperature=3.0, seed=1),
        ),
    }
    results = {}
    config = EngineConfig(prefix_cache=False, max_batch_size=4)
    with Engine(checkpoint, config) as engine:
        speculation = engine.steps.scheduler.speculation
        for name, request in requests.items():
            speeds: dict[bool, list[float]] = {False: [], True: []}
            answers = set()
            for run in range(2 * (runs + 1)):
                is_on = bool(run % 2)
                engine.steps.scheduler.speculation = speculation if is_on else None
                start = time.perf_counter()
                (done,) = engine.generate([request])
                if run > 1:  # the first pair records the steps
                    speeds[is_on].append(len(done.token_ids) / (time.perf_counter() - start))
                answers.add(tuple(done.token_ids))
            if len(answers) > 1:
                raise click.ClickException(f"speculation changed the result of: {name}")
            off, on = (statistics.median(speeds[key]) for key in (False, True))
            results[name] = {
                "tok_s": round(on, 1),
                "without_tok_s": round(off, 1),
                "ratio": round(on / off, 3),
                "pairs": [
                    round(b / a, 3) for a, b in zip(speeds[False], speeds[True], strict=True)
                ],
            }
        stats = engine.stats
        results["drafts"] = {"computed": stats.draft_tokens, "accepted": stats.accepted_tokens}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
