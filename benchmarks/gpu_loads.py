"""Whole loads that gpu.py times, on dummy weights with real shapes, and peers on the same load."""

import json
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_checks import CUDA
from benchmarks.gpu_times import Limits, Row
from engine import Engine, EngineConfig, Request, SamplingParams
from engine.step_probe import StepProbe
from getp.analysis import part_timer  # noqa: F401  silences torch's profiler
from getp.report.efficiency import run_cost
from model.cost.known_models import KNOWN_CONFIGS


def nano_load() -> tuple[list[list[int]], list[int]]:
    """Return the load of nano-vllm's bench.py: 256 requests, prompts and outputs of 100 to 1024."""
    rng, count = random.Random(0), 256
    prompts = [
        [rng.randint(0, 10_000) for _ in range(rng.randint(100, 1024))] for _ in range(count)
    ]
    return prompts, [rng.randint(100, 1024) for _ in range(count)]


def short_load(count: int, positions: int) -> tuple[list[list[int]], list[int]]:
    """Return prompts of 8 to 32 tokens, each with as many outputs as fill `positions`."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10_000) for _ in range(rng.randint(8, 32))] for _ in range(count)]
    return prompts, [positions - len(prompt) for prompt in prompts]


def ragged_load(count: int) -> tuple[list[list[int]], list[int]]:
    """Return prompts of 50 to 300 tokens with 20 to 300 outputs, for more requests than a batch."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10_000) for _ in range(rng.randint(50, 300))] for _ in range(count)]
    return prompts, [rng.randint(20, 300) for _ in range(count)]


def context_load(count: int, context: int, outputs: int) -> tuple[list[list[int]], list[int]]:
    """Return requests that have `context` tokens when half of their outputs are generated."""
    rng, size = random.Random(0), context - outputs // 2
    return [[rng.randint(0, 10_000) for _ in range(size)] for _ in range(count)], [outputs] * count


@contextmanager
def dummy_checkpoint(name: str) -> Iterator[Path]:
    """Provide a directory with the config.json of a well-known model, without weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(KNOWN_CONFIGS[name]))
        yield Path(folder)


def time_load(
    name: str,
    load: tuple[list[list[int]], list[int]],
    limits: Limits,
    max_s: float,
    batch_size: int = 256,
) -> Iterator[Row]:
    """Measure output tokens per second of a load on dummy weights, for at most `max_s` seconds.

    The share is the time that the FLOPs or the bytes of all steps need at the measured limits,
    whichever is longer, divided by the time taken.
    """
    prompts, outputs = load
    notices: list[str] = []
    with (
        dummy_checkpoint(name) as folder,
        Engine(
            folder,
            EngineConfig(
                device="cuda",
                dummy_weights=True,
                prefix_cache=False,
                max_batch_size=min(batch_size, len(prompts)),
            ),
            notice=notices.append,
        ) as engine,
    ):
        warm = SamplingParams(max_new_tokens=4, ignore_eos=True)
        list(engine.generate([Request(prompts[0], warm)] * min(4, len(prompts))))
        yield Row(f"{name}: compiling", engine.stats.compile_s, "s")
        yield Row(f"{name}: capturing", engine.stats.capture_s, "s")
        before = replace(engine.stats)
        start = time.perf_counter()
        done = _completed_requests(engine, load, start + max_s)
        torch.cuda.synchronize()
        spent = time.perf_counter() - start
        stats = engine.stats.since(before)
        cost, moved = run_cost(engine.model_config, "bfloat16", stats)
        # A request's first token comes from its last prefill chunk, the others from decode steps.
        tokens = stats.decode_tokens + stats.prefill_chunks
        completed = "" if done == len(prompts) else f" ({done} done)"
        title = f"{name}, {len(prompts)} requests{completed}"
        yield from (Row(f"{name}: {notice}", math.nan, "") for notice in notices)
        least, of = max(
            (moved.total / limits.copy, "copy"), (cost.matrix / limits.product, "product")
        )
        yield Row(title, tokens / spent, "tok/s", least / spent, of)
        yield Row(f"{title}: time outside the model", 1 - stats.model_s / spent, "of it")
        if len(prompts) == 1:
            yield from count_launches(engine, name)
        middle = sorted(len(p) + n // 2 for p, n in zip(prompts, outputs, strict=True))
        yield from profile_step(engine, middle[len(middle) // 2])


def _completed_requests(engine: Engine, load: tuple[list[list[int]], list[int]], end: float) -> int:
    """Run the load until `time.perf_counter()` reaches `end`; return how many requests completed.

    Raises RuntimeError if a request fails, because without it the load would be another one.
    """

    def time_is_up(token: int) -> bool:
        return time.perf_counter() > end

    # Each request checks the time, because requests of equal length all finish in the last step.
    requests = [
        Request(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True), i, time_is_up)
        for i, (prompt, count) in enumerate(zip(*load, strict=True))
    ]
    done = 0
    for completion in engine.generate(requests):
        if completion.error is not None:
            raise RuntimeError(f"request {completion.request_id} failed: {completion.error}")
        done += completion.finish_reason == "length"
        if time.perf_counter() > end:
            break
    return done


def profile_step(engine: Engine, context: int) -> Iterator[Row]:
    """Measure the slowest kernels of a decode step of the largest batch, without graphs.

    Programmatic launch is off, because with it the times of successive kernels overlap.
    """
    from torch.profiler import ProfilerActivity, profile

    from model.ops.triton.tiles import Target

    probe = StepProbe(engine, engine.max_batch_size, 1, context)
    count, spent = 4, Counter[str]()
    with patch.object(Target, "launch_options", {"PROGRAMMATIC_LAUNCH": False}):
        probe.step()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            for _ in range(count):
                probe.step()
            torch.cuda.synchronize()
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += event.time_range.elapsed_us()
    for name, us in spent.most_common(8):
        yield Row(f"one step: {name[:60]}", us / count, "us", us / spent.total(), "all kernels")


def count_launches(engine: Engine, name: str) -> Iterator[Row]:
    """Count kernels and launches per token while decoding one request, with torch's profiler.

    Also measures how long at least one kernel runs per token; the rest of the time is between
    kernels.
    """
    from torch.profiler import ProfilerActivity, profile

    counts = []
    for tokens in (4, 4 + 16):  # the same prefill twice; the difference is 16 decode steps
        request = Request([1] * 100, SamplingParams(max_new_tokens=tokens, ignore_eos=True))
        list(engine.generate([request]))
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            list(engine.generate([request]))
            torch.cuda.synchronize()
        on_gpu = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        launches = sum(
            "Launch" in e.name
            for e in found.events()
            if e.device_type == torch.autograd.DeviceType.CPU
        )
        kernels = sum(not e.name.startswith(("Mem", "mem")) for e in on_gpu)
        counts.append((kernels, launches, union_us(on_gpu)))
    kernels, launches, us = ((b - a) / 16 for a, b in zip(*counts, strict=True))
    yield Row(f"{name}: kernels per token", kernels, "kernels")
    yield Row(f"{name}: kernels per layer", kernels / len(engine.model_config.layers), "kernels")
    yield Row(f"{name}: launches per token", launches, "launches")
    yield Row(f"{name}: kernel and copy time per token", us, "us")


def union_us(events: list[Any]) -> float:
    """Return for how many microseconds at least one of the events runs."""
    total, until = 0.0, -math.inf
    for span in sorted((e.time_range for e in events), key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def time_transformers(requests: int, outputs: int) -> Iterator[Row]:
    """Measure continuous batching of transformers on the first prompts of the nano-vllm load."""
    import transformers

    config = transformers.AutoConfig.for_model(**KNOWN_CONFIGS["qwen3-0.6b"])
    with torch.device(CUDA):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    prompts = nano_load()[0][:requests]
    settings = transformers.GenerationConfig(
        max_new_tokens=outputs, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    model.generate_batch(inputs=prompts[:4], generation_config=settings)
    start = time.perf_counter()
    done = model.generate_batch(inputs=prompts, generation_config=settings)
    spent = time.perf_counter() - start
    # transformers only logs errors and returns the tokens generated before them.
    counts = [len(output.generated_tokens) for output in done.values()]
    if counts != [outputs] * requests:
        raise RuntimeError(f"transformers generated {sum(counts)} of {requests * outputs} tokens")
    rate = sum(counts) / spent
    title = f"transformers {transformers.__version__}, {requests} requests, {outputs} outputs each"
    yield Row(title, rate, "tok/s")


def time_vllm() -> Iterator[Row]:
    """Measure vLLM on the nano-vllm load, if it is installed."""
    if find_spec("vllm") is None:
        yield Row("vLLM: not installed", float("nan"), "")
        return
    import vllm

    prompts, outputs = nano_load()
    with dummy_checkpoint("qwen3-0.6b") as folder:
        model = vllm.LLM(str(folder), load_format="dummy", skip_tokenizer_init=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [
            vllm.SamplingParams(temperature=0, ignore_eos=True, max_tokens=count, detokenize=False)
            for count in outputs
        ]
        model.generate(inputs[:4], params[:4])
        start = time.perf_counter()
        model.generate(inputs, params)
        yield Row(f"vLLM {vllm.__version__}", sum(outputs) / (time.perf_counter() - start), "tok/s")
