"""Mode getp: a job on a file of prompts."""

import shlex
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from getp.cli import loading
from getp.cli.settings import Settings
from getp.cli.wording import option_name, program
from getp.errors import UsageProblem
from getp.files import STDIO
from getp.terminal import print_message

if TYPE_CHECKING:
    from getp.job.inputs import Source
    from getp.job.run import Job
    from tokenizer import Tokenizer


_PROMPT_TOKENS = 64  # of a short prompt


def run(settings: Settings) -> int:
    """Run the job; return the exit status. Raises GetpError and errors of the engine."""
    loading.needed(settings, settings.prompt.input, "-i/--input FILE")
    loading.needed(settings, settings.job.output, "-o/--output FILE")
    loading.check_system(settings)
    loading.check_agreement(settings)
    if settings.result_file.reference is not None and settings.job.shard is not None:
        raise UsageProblem("--reference does not apply to a shard: compare the merged results")
    if settings.parallel.ray_address is not None and settings.parallel.replicas is None:
        raise UsageProblem("--ray-address needs --replicas N or --replicas auto")
    from getp.job.run import read, run_job

    tokenizer = loading.load_tokenizer(settings)
    loading.check_thinking(settings, tokenizer)
    job = _job(settings, tokenizer)
    source = read(job)
    if not source.format.has_messages and not settings.prompt.chat_template:
        loading.check_variables(settings)
    job = replace(job, expected_s=_expected_seconds(settings, job, source))
    if not source.format.has_messages and settings.prompt.chat_template is None:
        _note_unused_template(tokenizer)
    if settings.parallel.replicas is None:
        return run_job(job, source, tokenizer, loading.load_engine(settings))
    with closing(loading.load_cluster(settings)) as cluster:
        return run_job(job, source, tokenizer, cluster)


def _expected_seconds(settings: Settings, job: "Job", source: "Source") -> float | None:
    """Return how long the job takes on this machine's GPU as mode plan predicts it.

    Prompts are not read for it: each counts as a short one, and each answer has the length limit
    that holds where a request sets none. None on a CPU, with replicas, for a GPU that the
    cost model does not know, and for a model that does not fit.
    """
    engine = settings.engine
    if engine.device == "cpu" or settings.parallel.replicas is not None or not source.total:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    from getp.analysis import job_plan
    from getp.analysis.lookup import find_model
    from model.cost.devices import device_of_driver
    from model.cost.measure import hardware_name

    device = device_of_driver(hardware_name(torch.device("cuda", torch.cuda.current_device())))
    if device is None:
        return None
    model = find_model(loading.checkpoint_folder(settings))
    model = replace(model, config=replace(model.config, kv_dtype=engine.kv_dtype))
    params = job.defaults.fill(source.format.defaults)
    longest = min(params.max_positions or model.config.max_positions, model.config.max_positions)
    output = max(1, min(params.max_new_tokens or longest, longest - _PROMPT_TOKENS))
    limits = job_plan.Limits(engine.max_batch_size, engine.max_batch_tokens, engine.tensor_parallel)
    dtype = model.config.dtype if engine.dtype == "auto" else engine.dtype
    planned = job_plan.Job([_PROMPT_TOKENS] * source.total, [output] * source.total)
    efficiency = job_plan.efficiency_of(device, dtype, model)
    return job_plan.predict(model, planned, device, dtype, limits, efficiency).seconds


def _note_unused_template(tokenizer: "Tokenizer") -> None:
    if tokenizer.template is not None:
        print_message(
            "getp: prompts are completed as they are; --chat-template applies the model's chat "
            "template"
        )


def _reading_hint(settings: Settings) -> str:
    """Return a message with the command that prints the answers of this job as text."""
    given = [settings.checkpoint] if settings.checkpoint is not None else []
    if settings.prompt.tokenizer is not None:
        given += ["-z", settings.prompt.tokenizer]
    output = _of_shard(settings, settings.job.output or "")
    command = shlex.join([*program(), *given, "-m", "decode", "-i", output])
    return (
        f"{output} has token ids; this prints the answers as text (or use --output-format text):\n"
        f"    {command}"
    )


def _price(settings: Settings) -> float | None:
    """Return the price of a device per hour, if it is given. Raises UsageProblem."""
    prices = settings.plan.price
    if len(prices) > 1:
        raise UsageProblem("--price was given several times: give one price in mode getp")
    return prices[0] if prices else None


def _of_shard(settings: Settings, path: str) -> str:
    """Return the path of a file that each shard of the input has of its own."""
    from getp.job.results import shard_path

    shard = settings.job.shard
    return path if shard is None or path == STDIO else shard_path(path, shard)


def _job(settings: Settings, tokenizer: "Tokenizer") -> "Job":
    from getp.job.inputs import Part
    from getp.job.request_reader import RequestDefaults
    from getp.job.run import Job

    options, prompt = settings.job, settings.prompt
    defaults = loading.sampling_defaults(settings, tokenizer)
    return Job(
        input=prompt.input or "",
        output=_of_shard(settings, options.output or ""),
        columns=loading.columns(settings),
        part=Part(settings.table.first, options.shard),
        checkpoint=loading.checkpoint_name(settings),
        defaults=RequestDefaults(
            defaults.params,
            defaults.origins,
            loading.answer_options(settings, bool(prompt.chat_template)),
            prompt.system,
            prompt.variables,
            settings.sampling.thinking_budget,
            options.truncate,
        ),
        seed_given=settings.sampling.seed is not None,
        identity=loading.identity(settings),
        output_format=options.output_format,
        reading_hint=_reading_hint(settings),
        report=options.report and _of_shard(settings, options.report),
        price=_price(settings),
        reference=settings.result_file.reference,
        required_agreement=settings.result_file.require_agreement,
        details=settings.details,
        restart=options.restart,
        accept_different_rounding=options.accept_different_rounding,
        flush_s=options.flush_interval,
        grace_s=options.grace,
        max_errors=options.max_errors,
        schedule=options.schedule,
        name_of=option_name,
    )
