"""Whole loads that gpu.py times, on dummy weights with the shapes of real models."""

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path
from typing import TypeAlias

import torch

from benchmarks.gpu_sections.measure import Limits, Row, note
from benchmarks.gpu_sections.profiles import count_launches, profile_step
from engine import Engine, EngineConfig, Request, SamplingParams
from engine.stats import EngineStats
from getp.report.efficiency import run_cost
from model.cost.known_models import KNOWN_CONFIGS

Load: TypeAlias = tuple[list[list[int]], list[int]]
"""Prompts as token ids, and the number of output tokens of each."""

_PROFILE_S = 4.0  # a profile is left out if less time than this is left
_SAMPLE_S = 0.1  # between two looks at the counters


def nano_load() -> Load:
    """Return the load of nano-vllm's bench.py: 256 requests, prompts and outputs of 100 to 1024."""
    rng, count = random.Random(0), 256
    prompts = [
        [rng.randint(0, 10_000) for _ in range(rng.randint(100, 1024))] for _ in range(count)
    ]
    return prompts, [rng.randint(100, 1024) for _ in range(count)]


def equal_load(count: int, prompt: int, outputs: int) -> Load:
    """Return requests of equal size."""
    rng = random.Random(0)
    return [_random_ids(rng, prompt) for _ in range(count)], [outputs] * count


def ragged_load(count: int) -> Load:
    """Return prompts of 50 to 300 tokens with 20 to 300 outputs, for more requests than a batch."""
    rng = random.Random(0)
    prompts = [_random_ids(rng, rng.randint(50, 300)) for _ in range(count)]
    return prompts, [rng.randint(20, 300) for _ in range(count)]


def in_progress(load: Load, running: int) -> Load:
    """Return the load as it is after a long time: its first requests are at different positions.

    Of the first `running` requests, request i already has the share i / running of its outputs,
    which become part of its prompt. So a part of a long load has the mean context of the whole.
    """
    rng, (prompts, outputs) = random.Random(1), load
    running = min(running, len(prompts))
    done = [i * outputs[i] // running for i in range(running)]
    started = [prompts[i] + _random_ids(rng, count) for i, count in enumerate(done)]
    left = [outputs[i] - count for i, count in enumerate(done)]
    return started + prompts[running:], left + outputs[running:]


def _random_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randint(0, 10_000) for _ in range(count)]


@contextmanager
def dummy_checkpoint(name: str) -> Iterator[Path]:
    """Provide a directory with the config.json of a well-known model, without weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(dumps(KNOWN_CONFIGS[name]))
        yield Path(folder)


@contextmanager
def dummy_engine(
    name: str,
    batch_size: int,
    notices: list[str] | None = None,
    kv_memory: int | None = None,
) -> Iterator[Engine]:
    """Provide an engine on the GPU with random weights of a well-known model.

    It uses the default kernels, even if they fail their checks. Notices are added
    to the list; without one they raise RuntimeError.
    """
    config = EngineConfig(
        device="cuda",
        dummy_weights=True,
        prefix_cache=False,
        max_batch_size=batch_size,
        kv_memory=kv_memory,
        trust_kernels=True,
    )
    keep = _refuse if notices is None else notices.append
    with dummy_checkpoint(name) as folder, Engine(folder, config, notice=keep) as engine:
        yield engine


def _refuse(notice: str) -> None:
    raise RuntimeError(notice)


@dataclass
class Window:
    """The part of a run in which the batch is full: after the first prompts, until requests lack.

    Ends the run `max_s` seconds after its start, or at `until` (`time.time()`).
    """

    engine: Engine
    first_prompts: int  # tokens
    max_s: float
    until: float
    start: float = 0.0  # time.perf_counter()
    end: float = 0.0
    at_start: EngineStats | None = None
    at_end: EngineStats | None = None
    is_over: bool = False
    _next: float = 0.0
    _prefilled: int = 0

    def __post_init__(self) -> None:
        """Remember the counter at the start of the run."""
        self._prefilled = self.engine.stats.prefill_tokens

    def __call__(self, token: int = 0) -> bool:
        """Look at the counters from time to time; return whether the run shall end."""
        now = time.perf_counter()
        if now < self._next:
            return self.is_over
        self._next, stats = now + _SAMPLE_S, self.engine.stats
        if self.at_start is None:
            # The first token of a prompt may have been computed as a decode token.
            if stats.prefill_tokens - self._prefilled >= self.first_prompts:
                self.start, self.at_start = now, replace(stats)
        elif stats.short_steps == self.at_start.short_steps:
            self.end, self.at_end = now, replace(stats)
        is_full = self.at_start is not None and now - self.start > self.max_s
        self.is_over = self.is_over or is_full or time.time() > self.until
        return self.is_over


def run_load(engine: Engine, load: Load, window: Window | None = None) -> dict[int, list[int]]:
    """Run the load, or as long as the window lasts; return the tokens of completed requests.

    Raises RuntimeError if a request fails, because without it the load would be another one.
    """
    # Each request looks at the time, because requests of equal length all finish in one step.
    requests = [
        Request(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True), i, window)
        for i, (prompt, count) in enumerate(zip(*load, strict=True))
    ]
    done = {}
    for completion in engine.generate(requests):
        if completion.error is not None:
            raise RuntimeError(f"request {completion.request_id} failed: {completion.error}")
        if completion.finish_reason == "length":
            done[completion.request_id] = completion.token_ids
        if window is not None and window.is_over:
            break
    return done


def time_load(
    name: str,
    title: str,
    load: Load,
    limits: Limits,
    max_s: float,
    batch_size: int = 256,
    published: str = "",
) -> Iterator[Row]:
    """Measure output tokens per second of a load on dummy weights.

    Gives the rate of the whole load if it ends in time, and that of the steady state, in which the
    batch is full: it is measured for at most `max_s` seconds. The share is the time that the FLOPs
    or the bytes of all steps need at the measured limits, whichever is longer, divided by the time
    taken.
    """
    prompts, outputs = load
    notices: list[str] = []
    batch_size = min(batch_size, len(prompts))
    with dummy_engine(name, batch_size, notices) as engine:
        warm = SamplingParams(max_new_tokens=4, ignore_eos=True)
        list(engine.generate([Request(prompts[0], warm)] * min(4, len(prompts))))
        yield Row(f"{name}: compiling", engine.stats.compile_s, "s")
        yield Row(f"{name}: capturing", engine.stats.capture_s, "s")
        yield from (note(f"{name}: {notice}") for notice in notices)
        first = sum(len(prompt) - 1 for prompt in prompts[: engine.max_batch_size])
        window = Window(engine, first, max_s, limits.until)
        before, start = replace(engine.stats), time.perf_counter()
        done = len(run_load(engine, load, window))
        torch.cuda.synchronize()
        spent, total = time.perf_counter() - start, engine.stats.since(before)
        if done == len(prompts):
            yield _rate(engine, f"{title}, whole", total, spent, limits, published)
        if window.at_start is not None and window.at_end is not None:
            stats, seconds = window.at_end.since(window.at_start), window.end - window.start
            context = stats.decode_context / max(1, stats.decode_tokens)
            full = (
                f"{title}, steady state of {seconds:.1f} s, {stats.batch_sum / stats.steps:.0f} "
                f"running, mean context {context:.0f}, {done} of {len(prompts)} requests finished"
            )
            yield _rate(engine, full, stats, seconds, limits, published)
        elif done < len(prompts):
            yield note(f"{title}: stopped before the first {batch_size} prompts were computed")
        yield Row(f"{title}: time outside the model", 1 - total.model_s / spent, "of it")
        if limits.until - time.time() < _PROFILE_S:
            return
        if len(prompts) == 1:
            yield from count_launches(engine, name)
        middle = sorted(len(p) + n // 2 for p, n in zip(prompts, outputs, strict=True))
        yield from profile_step(engine, middle[len(middle) // 2])


def _rate(
    engine: Engine, title: str, stats: EngineStats, spent: float, limits: Limits, published: str
) -> Row:
    """Return the row of a rate of output tokens, with its share of the GPU's limit."""
    cost = run_cost(engine.model_config, "bfloat16", stats)
    # A request's first token comes from its last prefill chunk, the others from decode steps.
    tokens = stats.decode_tokens + stats.prefill_chunks
    copy_s, product_s = cost.bytes.total / limits.copy, cost.flops.matrix / limits.product
    least, of = max((copy_s, "copy"), (product_s, "product"))
    return Row(title, tokens / spent, "tok/s", least / spent, of, published)
