"""The options of mode plan → one step or a whole job, and how it is shown."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from getp import EMBEDDED
from getp.analysis import job_plan as plan_job
from getp.analysis import roofline_plot as plot
from getp.analysis import step_plan as plan
from getp.errors import UsageProblem
from getp.terminal import say
from getp.units import print_json
from model.cost.devices import Device

if TYPE_CHECKING:
    from getp.analysis.job_requests import Requests


def run(options: SimpleNamespace, checkpoint: Path) -> int:
    """Plan what the options ask for; return the exit status. Raises GetpError."""
    if options.measure:
        plan.measure_again()
    if options.input is not None:
        return _job(options, checkpoint)
    if options.price:
        raise UsageProblem("--price needs -i/--input FILE: it is a job that has a price")
    if options.plot is not None:
        if options.plot == "-" and options.format == "json":
            raise UsageProblem("--plot - would draw between the JSON: name a file")
        plot.check_plot(options.plot)
    made = plan.make_plan(
        _model(options, checkpoint),
        plan.find_gpus(options.gpu),
        phase=options.phase or "decode",
        batch=options.batch or 1,
        query=options.query,
        context=options.context,
        dtype=options.dtype,
        tensor_parallel=options.tensor_parallel or 1,
        fused=options.fused,
    )
    if options.plot is not None:
        plan.write_plot(made, options.plot)
    if options.format == "json":
        print_json(plan.as_json(made))
    elif options.plot != "-":
        plan.print_plan(made)
    return 0


def _job(options: SimpleNamespace, checkpoint: Path) -> int:
    for name in ("phase", "batch", "query", "context", "plot", "fused"):
        if getattr(options, name):
            raise UsageProblem(f"--{name} plans one step; with -i/--input a job is predicted")
    model = _model(options, checkpoint)
    gpus = plan.find_gpus(options.gpu)
    prices = _prices(options.price, gpus)
    requests = _requests(options, checkpoint)
    if requests.refused:
        say(
            f"getp: warning: requests that mode getp would refuse: {requests.refused:,}, the "
            f"first one in {requests.first_refused}"
        )
    job = plan_job.make_job(requests, model.config.max_positions, options.steps)
    dtype = model.config.dtype if options.dtype == "auto" else options.dtype
    limits = plan_job.Limits(
        options.max_batch_size or plan_job.Limits.max_batch_size,
        options.max_batch_tokens or plan_job.Limits.max_batch_tokens,
        options.tensor_parallel or 1,
    )
    found = []
    for gpu, price in zip(gpus, prices, strict=True):
        efficiency = plan_job.efficiency_of(gpu, dtype, model)
        for parts, replicas in plan_job.layouts(model, limits.tensor_parallel):
            shared = replace(limits, tensor_parallel=parts)
            found.append(
                plan_job.predict(model, job, gpu, dtype, shared, efficiency, price, replicas)
            )
    if options.format == "json":
        print_json(plan_job.as_json(model, job, dtype, limits, found))
    else:
        plan_job.print_job(model, job, dtype, limits, found, requests.counted)
    return 0


def _model(options: SimpleNamespace, checkpoint: Path) -> plan.Model:
    model = plan.find_model(checkpoint)
    return model if options.checkpoint is not None else replace(model, name=EMBEDDED)


def _prices(given: tuple[float, ...], gpus: list[Device]) -> list[float | None]:
    """One price for every GPU, or one for each."""
    if len(given) not in (0, 1, len(gpus)):
        raise UsageProblem(f"--price: {len(given)} prices for {len(gpus)} GPUs")
    return [*given] if len(given) == len(gpus) else [*(given or (None,))] * len(gpus)


def _requests(options: SimpleNamespace, checkpoint: Path) -> "Requests":
    from engine import SamplingParams
    from getp.analysis.job_requests import read_requests
    from getp.job.request_reader import Defaults

    folder = options.tokenizer or (checkpoint if checkpoint.is_dir() else None)
    params = SamplingParams(max_new_tokens=options.max_new_tokens)
    defaults = Defaults(params, chat=bool(options.chat_template), system=options.system)
    return read_requests(options.input, folder, defaults)
