"""How close 16-bit results are to float32's: `python benchmarks/quality.py CHECKPOINT`.

The checkpoint answers prompts in float32, greedily. Then each measured engine computes the logits
of the same prompts and answers, and answers the same prompts itself. The figures are the mean
Kullback-Leibler divergence from float32's distribution in nats, and the share of positions at which
the most likely token is the same, both over whole texts and over the answers alone; and how many
answers are equal as a whole. With --transformers the same figures of transformers in that dtype are
added.

`python benchmarks/quality.py CHECKPOINT TEXT` reads a file instead, as llama.cpp's llama-perplexity
does with --kl-divergence, so that figures can be compared: in windows of 512 tokens the second half
is predicted, and the perplexity is added.

Prints a table, then one JSON object as the last line.
"""

import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: F401, I001  before torch: sets how OpenMP threads wait

import click
import torch
from rich.console import Console
from rich.table import Table

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.execution.model_runner import ModelRunner
from engine.resolve import load_model_config, resolve
from getp.text.prompts import encode_prompt
from model.config import DTYPES
from model.ops.forward_batch import ForwardBatch, GroupTables
from tokenizer import Tokenizer

_WINDOW = 512  # tokens; llama-perplexity's context

Logits = Callable[[list[int]], torch.Tensor]
"""Token ids of a sequence → the logits of every position [tokens, vocab]."""

_QUESTIONS = """What is the capital of France?
Who wrote Romeo and Juliet?
Why is the sky blue?
Name three primary colours.
What is the boiling point of water?
How many days are in a leap year?
Explain photosynthesis in one sentence.
What is the largest planet?
Write a short poem about the sea.
What is 12 times 12?
Translate "good morning" into Spanish.
Who painted the Mona Lisa?
What do bees make?
How do I boil an egg?
What is the opposite of hot?
List the continents.
What is gravity?
Describe a cat in five words.
What is the fastest land animal?
Give me a tip for sleeping well.
What language is spoken in Brazil?
What is the speed of light?
Why do leaves change colour in autumn?
Write a sentence with the word "river".
What is a prime number?
Who was the first person on the Moon?
What is the chemical symbol of gold?
How many legs does a spider have?
What is the purpose of the heart?
Suggest a name for a dog.
What is machine learning?
How far is the Moon from Earth?
What is the main ingredient of bread?
Tell me a fact about whales.
What is the currency of Japan?
Write a haiku about rain.
What causes tides?
How do you say "thank you" in German?
What is the square root of 81?
Which ocean is the largest?""".split("\n")


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True))
@click.argument("text", type=click.Path(exists=True, dir_okay=False), required=False)
@click.option("--against", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16")
@click.option("--kv-dtype", "kv_dtypes", default=["auto"], multiple=True, help="Can be repeated.")
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--quantize", multiple=True, help="Also measure with weights in int8, int4 or fp8. Repeatable."
)
@click.option("--tokens", default=32, show_default=True, help="Tokens of each answer, at most.")
@click.option("--windows", default=16, show_default=True, help="Windows of a text, at most.")
@click.option("--transformers", "with_transformers", is_flag=True, help="Measure transformers too.")
def main(
    checkpoint: str,
    text: str | None,
    against: str,
    dtype: str,
    kv_dtypes: tuple[str, ...],
    device: str,
    quantize: tuple[str, ...],
    tokens: int,
    windows: int,
    with_transformers: bool,
) -> None:
    """Compare a dtype with float32 on a checkpoint, dtypes of the KV cache, quantized weights."""
    exact = EngineConfig(dtype=against, device=device)
    configs = {}
    for kv_dtype, form in itertools.product(kv_dtypes, (None, *quantize)):
        name = f"getp {form or dtype}" + ("" if kv_dtype == "auto" else f", KV cache in {kv_dtype}")
        configs[name] = replace(exact, dtype=dtype, kv_dtype=kv_dtype, quantize=form)
    if text is not None:
        _compare_on_text(checkpoint, text, windows, exact, configs)
        return
    prompts = _prompts(checkpoint)
    reference = _answers(checkpoint, exact, prompts, tokens)
    texts = [prompt + answer for prompt, answer in zip(prompts, reference, strict=True)]
    starts = [len(prompt) - 1 for prompt in prompts]  # where the answer's first token is predicted
    expected = _distributions(_own(checkpoint, exact, texts), texts)
    measured = {}
    for name, config in configs.items():
        measured[name] = (
            _distributions(_own(checkpoint, config, texts), texts),
            _answers(checkpoint, config, prompts, tokens),
        )
    if with_transformers:
        measured[f"transformers {dtype}"] = _transformers(checkpoint, dtype, prompts, texts, tokens)
    rows = {
        name: {
            "text": _figures(expected, found),
            "answers": _figures(_answers_of(expected, starts), _answers_of(found, starts)),
            "equal_answers": sum(a == b for a, b in zip(answers, reference, strict=True)),
        }
        for name, (found, answers) in measured.items()
    }
    _print(rows, len(prompts))


def _compare_on_text(
    checkpoint: str,
    path: str,
    windows: int,
    exact: EngineConfig,
    configs: dict[str, EngineConfig],
) -> None:
    """Print the figures of the second halves of windows of a text, window by window."""
    ids = Tokenizer.load(checkpoint).encode(Path(path).read_text("utf-8"))
    texts = [ids[i : i + _WINDOW] for i in range(0, len(ids) - _WINDOW + 1, _WINDOW)][:windows]
    if not texts:
        raise click.ClickException(f"{path}: has {len(ids)} tokens, fewer than {_WINDOW}")
    logits = _own(checkpoint, exact, texts)
    expected = [_second_half(logits, text) for text in texts]
    table = Table("engine", "positions", "perplexity", "KL divergence", "same top token")
    rows = {}
    for name, config in {f"getp {exact.dtype}": exact, **configs}.items():
        logits = _own(checkpoint, config, texts)
        losses, parts = 0.0, []
        for text, distribution in zip(texts, expected, strict=True):
            found = _second_half(logits, text)
            parts.append(_figures([distribution], [found]))
            wanted = torch.tensor(text[-len(found) :])[:, None]
            losses -= float(found.gather(1, wanted).sum(dtype=torch.float64))
        count = sum(part["positions"] for part in parts)
        row = {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
        rows[name] = {**row, "positions": count, "perplexity": math.exp(losses / count)}
        table.add_row(
            name,
            str(count),
            f"{rows[name]['perplexity']:.4f}",
            f"{row['kl_divergence']:.3e}",
            f"{row['same_top_token']:.2%}",
        )
    Console().print(table)
    print(json.dumps({"windows": len(texts), "engines": rows}))


def _second_half(logits: Logits, ids: list[int]) -> torch.Tensor:
    """The log-probabilities of the tokens after the middle of a window and one more."""
    return logits(ids[:-1])[len(ids) // 2 :].float().log_softmax(-1).cpu()


def _prompts(checkpoint: str) -> list[list[int]]:
    """The questions in the checkpoint's chat template, or as they are if it has none."""
    tokenizer = Tokenizer.load(checkpoint)
    is_chat = tokenizer.template is not None
    return [encode_prompt(tokenizer, question, is_chat, None) for question in _QUESTIONS]


def _answers(
    checkpoint: str, config: EngineConfig, prompts: list[list[int]], tokens: int
) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=tokens)
    with Engine(checkpoint, config) as engine:
        requests = [Request(prompt, params, request_id=i) for i, prompt in enumerate(prompts)]
        done = {c.request_id: list(c.token_ids) for c in engine.generate(requests)}
    return [done[i] for i in range(len(prompts))]


def _own(checkpoint: str, config: EngineConfig, texts: list[list[int]]) -> Logits:
    """The engine's own forward pass, with all of a sequence in one step."""
    settings = resolve(config, load_model_config(checkpoint, config))
    runner = ModelRunner(settings.model, settings.device, settings.dtype)
    runner.load(Path(checkpoint), dummy=False)
    size, longest = settings.block_size, max(map(len, texts))
    blocks = -(-longest // size)
    runner.allocate(blocks + 1, size, longest, 1)

    def logits(ids: list[int]) -> torch.Tensor:
        count, target = len(ids), settings.device
        positions = torch.arange(count, device=target)
        table = torch.arange(1, blocks + 1, dtype=torch.int32, device=target)[None]
        tables = GroupTables(table, positions + size)
        batch = ForwardBatch(
            token_ids=torch.tensor(ids, device=target),
            positions=positions + settings.model.rope.first_row(count),
            host_query_lens=[count],
            host_context_lens=[count],
            num_single=int(count == 1),
            groups=tuple(tables for _ in runner.groups),
            logits_rows=positions,
            cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32, device=target),
            context_lens=torch.tensor([count], dtype=torch.int32, device=target),
        )
        with torch.inference_mode():
            return runner.forward(batch)

    return logits


def _transformers(
    checkpoint: str,
    dtype: str,
    prompts: list[list[int]],
    texts: list[list[int]],
    tokens: int,
) -> tuple[list[torch.Tensor], list[list[int]]]:
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return peer(torch.tensor([ids])).logits[0]

    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        done = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        answers.append(done[0, len(prompt) :].tolist())
    return _distributions(logits, texts), answers


def _distributions(logits: Logits, texts: list[list[int]]) -> list[torch.Tensor]:
    """For each text the log-probabilities float32 [tokens but the last, vocab]."""
    return [logits(ids[:-1]).float().log_softmax(-1).cpu() for ids in texts]


def _answers_of(texts: list[torch.Tensor], starts: list[int]) -> list[torch.Tensor]:
    return [text[start:] for text, start in zip(texts, starts, strict=True)]


def _figures(expected: list[torch.Tensor], found: list[torch.Tensor]) -> dict[str, float]:
    pairs = list(zip(expected, found, strict=True))
    count = sum(len(p) for p in expected)
    divergence = sum(float((p.exp() * (p - q)).sum(dtype=torch.float64)) for p, q in pairs)
    same = sum(int((p.argmax(-1) == q.argmax(-1)).sum()) for p, q in pairs)
    return {
        "positions": count,
        "kl_divergence": divergence / count,
        "same_top_token": same / count,
    }


def _print(rows: dict[str, dict[str, Any]], prompts: int) -> None:
    table = Table("engine", "positions", "KL divergence", "same top token", "equal answers")
    for name, row in rows.items():
        for part in ("text", "answers"):
            figures = row[part]
            table.add_row(
                name if part == "text" else "",
                f"{part}, {figures['positions']}",
                f"{figures['kl_divergence']:.2e}",
                f"{figures['same_top_token']:.2%}",
                f"{row['equal_answers']} of {prompts}" if part == "answers" else "",
            )
    Console().print(table)
    print(json.dumps({"prompts": prompts, "engines": rows}))


if __name__ == "__main__":
    main()
