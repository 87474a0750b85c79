"""Mode plan: the estimated cost and speed of one step, or of a whole job, on GPUs."""

from dataclasses import replace
from typing import TYPE_CHECKING

from getp import EMBEDDED, tables
from getp.analysis import job_plan, lookup, roofline_plot, step_plan
from getp.analysis.job_plan_table import print_job
from getp.analysis.step_plan_table import print_plan, write_plot
from getp.cli import loading
from getp.cli.settings import Settings
from getp.errors import UsageProblem
from getp.files import STDIO, write_report
from getp.terminal import warn
from getp.units import counted
from model.cost.devices import Device
from model.gguf import is_gguf

if TYPE_CHECKING:
    from getp.analysis.job_requests import Requests

_STEP_DETAILS = "MFU and MBU, the cost of each operation, communication, sources of the peaks"


def run(settings: Settings) -> int:
    """Print the plan; return the exit status. Raises GetpError."""
    loading.check_system(settings)
    step, plan = settings.step, settings.plan
    if step.measure:
        lookup.measure_again()
    if settings.prompt.input is not None:
        return _job(settings, settings.prompt.input)
    if plan.price:
        raise UsageProblem("--price needs a job: -i/--input FILE")
    if plan.plot is not None:
        if plan.plot == STDIO and step.format == "json":
            raise UsageProblem(
                "--plot - would mix with the JSON on standard output: give a file name"
            )
        roofline_plot.check_plot(plan.plot)
    planned = step_plan.make_plan(
        _model(settings),
        lookup.find_gpus(step.gpu),
        phase=step.phase or "decode",
        batch=step.batch or 1,
        query=step.query,
        context=step.context,
        dtype=plan.dtype,
        tensor_parallel=settings.parallel.tensor_parallel or 1,
        fused=plan.fused,
    )
    if plan.plot is not None:
        write_plot(planned, plan.plot)
    if step.format == "json":
        write_report(STDIO, step_plan.as_json(planned))
    elif plan.plot != STDIO:
        print_plan(planned, settings.details)
        if not settings.details:
            tables.hint(f"--details: {_STEP_DETAILS}.")
    return 0


def _job(settings: Settings, path: str) -> int:
    """Print the plan of a whole job."""
    step, plan = settings.step, settings.plan
    for name, value in (
        ("phase", step.phase), ("batch", step.batch), ("query", step.query),
        ("context", step.context), ("plot", plan.plot), ("fused", plan.fused),
    ):  # fmt: skip
        if value:
            raise UsageProblem(
                f"--{name} applies to a single step, but -i/--input plans a whole job: remove one"
            )
    model = _model(settings)
    gpus = lookup.find_gpus(step.gpu)
    prices = _prices(plan.price, gpus)
    requests = _requests(settings, path)
    if requests.refused:
        warn(
            f"mode getp would refuse {counted(requests.refused, 'request')}; the first is in "
            f"{requests.first_refused}"
        )
    job = job_plan.make_job(requests, model.config.max_positions)
    dtype = model.config.dtype if plan.dtype == "auto" else plan.dtype
    limits = job_plan.Limits(
        plan.max_batch_size,
        plan.max_batch_tokens,
        settings.parallel.tensor_parallel or 1,
    )
    predictions = []
    for gpu, price in zip(gpus, prices, strict=True):
        efficiency = job_plan.efficiency_of(gpu, dtype, model)
        for ranks, replicas in job_plan.layouts(model, limits.tensor_parallel):
            split = replace(limits, tensor_parallel=ranks)
            predictions.append(
                job_plan.predict(model, job, gpu, dtype, split, efficiency, price, replicas)
            )
    if step.format == "json":
        write_report(STDIO, job_plan.as_json(model, job, dtype, limits, predictions))
    else:
        print_job(model, job, dtype, predictions, requests.counted, settings.details)
        if not settings.details:
            tables.hint("--details: the time and the mean batch size of prefill and decode.")
    return 0


def _model(settings: Settings) -> lookup.Model:
    model = lookup.find_model(loading.checkpoint_folder(settings))
    model = replace(model, config=replace(model.config, kv_dtype=settings.plan.kv_dtype))
    if settings.plan.quantize:
        model = replace(model, config=model.config.quantized(settings.plan.quantize))
    return model if settings.checkpoint is not None else replace(model, name=EMBEDDED)


def _prices(given: tuple[float, ...], gpus: list[Device]) -> list[float | None]:
    """Return the price of each GPU: one price is that of every GPU."""
    if len(given) not in (0, 1, len(gpus)):
        raise UsageProblem(
            f"--price was given {len(given)} times for {len(gpus)} GPUs: give one price, or one "
            "per --gpu"
        )
    return [*given] if len(given) == len(gpus) else [*(given or (None,))] * len(gpus)


def _requests(settings: Settings, path: str) -> "Requests":
    from engine import SamplingParams
    from getp.analysis.job_requests import read_requests
    from getp.job.request_reader import RequestDefaults

    prompt = settings.prompt
    checkpoint = loading.checkpoint_folder(settings)
    has_tokenizer = checkpoint.is_dir() or is_gguf(checkpoint)
    folder = loading.tokenizer_path(settings) if prompt.tokenizer or has_tokenizer else None
    values, origins = loading.length_and_sampling(settings)
    answer = loading.answer_options(settings, bool(prompt.chat_template))
    defaults = RequestDefaults(
        SamplingParams(**values), origins, answer, prompt.system, prompt.variables
    )
    columns = loading.columns(settings)
    return read_requests(path, folder, defaults, columns, settings.table.first)
