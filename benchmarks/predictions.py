"""Compare predictions with measurements: `python benchmarks/predictions.py CHECKPOINT steps`.

    steps   decode steps beside what `-m plan --gpu local` predicts for them
    jobs    whole jobs beside what `-m plan -i FILE --gpu local` predicts
    gains   the throughput at eight times the batch beside what `-m profile` predicts
    losses  the largest loss that the report of a job names where it is provoked

The rates of this machine's kernels are measured again before and after each round, because a shared
machine changes its speed; the mean of both predictions counts, and the median of all rounds.
Experts are chosen at random, see `_balance_experts`. Prints a table, then one JSON object.
"""

import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: F401, I001  before torch: sets how OpenMP threads wait

import click
import torch

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.resolve import dtype_name
from engine.step_probe import StepProbe
from getp.analysis import advice, job_plan
from getp.analysis.lookup import Model
from getp.analysis.profile import Profile, profile
from getp.report.efficiency import run_efficiency
from model.cost.devices import Device
from model.cost.measure import local_device
from model.cost.measure_rates import measure_rates
from model.cost.roofline import bound_step
from model.cost.workload import Workload

CPU = torch.device("cpu")
_CONFIG = EngineConfig(device="cpu", max_batch_size=64, prefix_cache=False, speculation=False)
_NEW_TOKENS = 32  # of the requests of jobs
_LONGEST_JOB_S = 45.0
_SPIN = "while True: pass"

Point = tuple[int, int]  # batch and context
Measured = tuple[Callable[[Device], float], float]  # how a device predicts it, and the value


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("what", type=click.Choice(["steps", "jobs", "gains", "losses"]))
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 8, 32, 64))
@click.option("--context", "contexts", multiple=True, type=int, default=(128, 2048))
@click.option("--rounds", default=3, show_default=True)
def main(
    checkpoint: Path, what: str, batches: tuple[int, ...], contexts: tuple[int, ...], rounds: int
) -> None:
    """Print predictions and measurements at each batch size and context length."""
    device = local_device(CPU).device
    if what == "losses":
        print(json.dumps(_losses(checkpoint)))
        return
    measure = {"steps": _step, "jobs": _job, "gains": _gain}[what]
    found: dict[Point, list[tuple[float, float]]] = {}
    with Engine(checkpoint, _CONFIG) as engine:
        engine.warm_up()
        _balance_experts(engine)
        after = replace(device, rates=measure_rates(CPU))
        for _ in range(rounds):
            before, measured = after, {}
            for point in ((batch, context) for context in contexts for batch in batches):
                if (one := measure(engine, before, *point)) is not None:
                    measured[point] = one
            after = replace(device, rates=measure_rates(CPU))
            for point, (predict, value) in measured.items():
                predicted = statistics.mean((predict(before), predict(after)))
                found.setdefault(point, []).append((predicted, value))
    rows = []
    for (batch, context), pairs in found.items():
        predicted, value = (statistics.median(values) for values in zip(*pairs, strict=True))
        error = statistics.median(p / m for p, m in pairs) - 1
        print(
            f"batch {batch:>3}, context {context:>5}: predicted {predicted:.4g}, "
            f"measured {value:.4g}, error {error:+.1%}"
        )
        rows.append({"batch": batch, "context": context, "error": error, "pairs": pairs})
    print(json.dumps(rows))


def _balance_experts(engine: Engine) -> None:
    """Let tokens choose experts at random, as the cost model assumes and trained routers do.

    A router with random weights sends nearly all tokens to the same few experts.
    """
    moe = engine.model_config.moe
    if moe is None:
        return
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(engine.max_batch_tokens, moe.num_experts, generator=generator).argsort(1)
    chosen = order[:, : moe.router.top_k].contiguous()
    weights = torch.full(chosen.shape, 1 / moe.router.top_k)

    def route(
        logits: torch.Tensor, spec: Any, correction: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return chosen[: len(logits)], weights[: len(logits)]

    engine.runner.backend.route = route  # type: ignore[method-assign,assignment]


def _step(engine: Engine, device: Device, batch: int, context: int) -> Measured:
    """Return the seconds of a decode step, replayed as in a job."""
    probe = StepProbe(engine, batch, 1, context, replayed=True)
    for _ in range(2):  # the first is recorded
        probe.step()
    times: list[float] = []
    while sum(times) < 0.5 or len(times) < 5:
        start = time.perf_counter()
        probe.step()
        times.append(time.perf_counter() - start)
    probe.release()
    work = Workload("decode", batch, 1, context, dtype_name(engine.dtype))
    return lambda at: bound_step(engine.held_config, work, at).seconds, statistics.median(times)


def _job(engine: Engine, device: Device, batch: int, context: int) -> Measured | None:
    """Return the seconds of a job whose requests run at once.

    None if it would take too long.
    """
    prompt, dtype = context - _NEW_TOKENS // 2, dtype_name(engine.dtype)
    known = Model("checkpoint", engine.held_config)

    def predict(at: Device) -> float:
        job = job_plan.Job([prompt] * batch, [_NEW_TOKENS] * batch)
        efficiency = job_plan.efficiency_of(at, dtype, known)
        found = job_plan.predict(known, job, at, dtype, job_plan.Limits(), efficiency).seconds
        return math.inf if found is None else found

    if predict(device) > _LONGEST_JOB_S:
        return None
    # Copies of weights that are made in the course of a run are not there at its beginning.
    with Engine(engine.checkpoint, _CONFIG) as fresh:
        fresh.warm_up()
        _balance_experts(fresh)
        start = time.perf_counter()
        for _ in fresh.generate(_requests(fresh, batch, prompt)):
            pass
        return predict, time.perf_counter() - start


def _requests(
    engine: Engine, count: int, prompt: int, output: int = _NEW_TOKENS, wait_s: float = 0.0
) -> Iterator[Request]:
    """Yield requests of random tokens; wait_s: seconds before each after the first."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = engine.model_config.vocab_size
    ids = torch.randint(vocabulary, (count, prompt), generator=generator).tolist()
    for i, tokens in enumerate(ids):
        time.sleep(wait_s if i else 0.0)
        yield Request(tokens, SamplingParams(max_new_tokens=output, ignore_eos=True))


def _gain(engine: Engine, device: Device, batch: int, context: int) -> Measured | None:
    """Return the tokens per second at eight times the batch, which a profile predicts.

    None if the engine does not run as many sequences.
    """
    if 8 * batch > engine.max_batch_size:
        return None
    now = _profile(engine, device, batch, context)
    larger = replace(now.work, batch=8 * batch)

    def predict(at: Device) -> float:
        return larger.tokens / advice.predicted_seconds(replace(now, device=at), larger)

    return predict, _profile(engine, device, 8 * batch, context).tok_s


def _profile(engine: Engine, device: Device, batch: int, context: int) -> Profile:
    return profile(engine, device, phase="decode", batch=batch, query=1, context=context)


def _losses(checkpoint: Path) -> list[dict[str, Any]]:
    """Provoke losses; return what was to be named, and what the report names."""
    cases: tuple[tuple[str, str, dict[str, Any], dict[str, Any], int], ...] = (
        ("nothing", "below peak speed", {"max_batch_size": 16}, {"count": 16}, 0),
        ("a small KV pool", "KV memory was full", {"kv_memory": 4 << 20}, {"count": 16}, 0),
        ("slow input", "waited for prompts", {}, {"count": 6, "wait_s": 1.5}, 0),
        ("a batch of one", "batch was 1 of 64: too few", {}, {"count": 1, "output": 64}, 0),
        ("busy cores", "other processes", {"max_batch_size": 16}, {"count": 16}, 2),
    )
    rows = []
    for name, expected, settings, requests, busy in cases:
        with Engine(checkpoint, replace(_CONFIG, **settings)) as engine:
            engine.warm_up()
            _balance_experts(engine)
            others = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(busy)]
            try:
                start = time.perf_counter()
                done = sum(1 for _ in engine.generate(_requests(engine, prompt=96, **requests)))
                seconds = time.perf_counter() - start
            finally:
                for other in others:
                    other.kill()
            named = run_efficiency(engine.summary(), seconds, done).largest_loss or ""
        right = re.search(expected, named) is not None
        print(f"{name} ({seconds:.1f} s): {named}{'' if right else '  NOT AS EXPECTED'}")
        rows.append({"provoked": name, "named": named, "right": right})
    return rows


if __name__ == "__main__":
    main()
