"""Compare predictions with measurements: `python benchmarks/predictions.py CHECKPOINT`.

Measures the rates of this machine's kernels, then times decode steps and whole jobs in the engine
and prints them beside what `-m plan --gpu local` predicts from the rates. Each point's steps are
spread over the time of the measurement, because other users of a machine slow it down for seconds.
Prints a table, then one JSON object.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: F401, I001  before torch: sets how OpenMP threads wait

import click
import torch

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.resolve import dtype_name
from engine.step_probe import StepProbe
from getp.analysis import job_plan
from getp.analysis.lookup import Model
from model.cost.devices import Device
from model.cost.measure import local_device
from model.cost.roofline import bound_step
from model.cost.workload import Workload


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 8, 32, 64))
@click.option("--context", "contexts", multiple=True, type=int, default=(128, 2048))
@click.option("--seconds", default=1.0, show_default=True, help="Time for the steps of a point.")
@click.option("--new-tokens", default=64, show_default=True, help="Output tokens in jobs.")
@click.option("--job", "with_jobs", is_flag=True, help="Time whole jobs instead of steps.")
def main(
    checkpoint: Path, batches: tuple[int, ...], contexts: tuple[int, ...], seconds: float,
    new_tokens: int, with_jobs: bool,
) -> None:  # fmt: skip
    """Print predicted and measured times at each batch size and context length."""
    device = local_device(torch.device("cpu"), remeasure=True).device
    config = EngineConfig(
        device="cpu", max_batch_size=max(batches), prefix_cache=False, speculation=False
    )
    points = [(batch, context) for context in contexts for batch in batches]
    rows = []
    with Engine(checkpoint, config) as engine:
        engine.warm_up()
        _balance_experts(engine)
        for batch, context in points:
            if with_jobs:
                row = _job(engine, device, batch, context, new_tokens)
            else:
                row = _step(engine, device, batch, context, seconds)
            row = {"batch": batch, "context": context, **row}
            row["error"] = row["predicted_s"] / row["measured_s"] - 1
            rows.append(row)
            print(
                f"batch {batch:>3}, context {context:>5}: predicted {row['predicted_s']:.4f} s, "
                f"measured {row['measured_s']:.4f} s, error {row['error']:+.1%}",
                flush=True,
            )
    print(json.dumps(rows))


def _balance_experts(engine: Engine) -> None:
    """Let tokens choose experts at random, as the cost model assumes and trained routers do.

    A router with random weights sends nearly all tokens to the same few experts.
    """
    moe = engine.model_config.moe
    if moe is None:
        return
    tokens = engine.max_batch_tokens
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(tokens, moe.num_experts, generator=generator).argsort(1)
    chosen = order[:, : moe.router.top_k].contiguous()
    weights = torch.full(chosen.shape, 1 / moe.router.top_k)
    ops = engine.runner.backend
    ops.route = lambda logits, spec: (chosen[: len(logits)], weights[: len(logits)])  # type: ignore[method-assign]


def _step(
    engine: Engine, device: Device, batch: int, context: int, seconds: float
) -> dict[str, Any]:
    """Time a decode step as a job runs it."""
    probe = StepProbe(engine, batch, 1, context, replayed=True)
    for _ in range(2):  # the first is recorded
        probe.step()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        start = time.perf_counter()
        probe.step()
        times.append(time.perf_counter() - start)
    probe.release()
    work = Workload("decode", batch, 1, context, dtype_name(engine.dtype))
    predicted = bound_step(engine.held_config, work, device).seconds
    return {"predicted_s": predicted, "measured_s": statistics.median(times)}


def _job(
    engine: Engine, device: Device, batch: int, context: int, new_tokens: int
) -> dict[str, Any]:
    """Time a job of as many requests as run at once, at this mean context."""
    prompt = context - new_tokens // 2
    ids = torch.randint(
        engine.model_config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1)
    )
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    requests = [Request(tokens, params) for tokens in ids.tolist()]
    start = time.perf_counter()
    for _ in engine.generate(requests):
        pass
    measured = time.perf_counter() - start
    known = Model("checkpoint", engine.held_config)
    dtype = dtype_name(engine.dtype)
    prediction = job_plan.predict(
        known,
        job_plan.Job([prompt] * batch, [new_tokens] * batch),
        device,
        dtype,
        job_plan.Limits(engine.max_batch_size, engine.max_batch_tokens),
        job_plan.efficiency_of(device, dtype, known),
    )
    assert prediction.seconds is not None
    return {"predicted_s": prediction.seconds, "measured_s": measured}


if __name__ == "__main__":
    main()
