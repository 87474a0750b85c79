"""Mode getp: a job on a file of prompts."""

import shlex
from contextlib import closing
from typing import TYPE_CHECKING

from getp.cli import loading
from getp.cli.settings import Settings
from getp.cli.wording import option_name, program
from getp.errors import UsageProblem
from getp.terminal import print_message

if TYPE_CHECKING:
    from getp.job.run import Job
    from tokenizer import Tokenizer


def run(settings: Settings) -> int:
    """Run the job; return the exit status. Raises GetpError and errors of the engine."""
    loading.needed(settings, settings.prompt.input, "-i/--input FILE")
    loading.needed(settings, settings.job.output, "-o/--output FILE")
    loading.check_system(settings)
    if settings.parallel.ray_address is not None and settings.parallel.replicas is None:
        raise UsageProblem("--ray-address needs --replicas N or --replicas auto")
    from getp.job.run import read, run_job

    tokenizer = loading.load_tokenizer(settings)
    job = _job(settings, tokenizer)
    source = read(job)
    if not source.format.has_messages and settings.prompt.chat_template is None:
        _note_unused_template(tokenizer)
    if settings.parallel.replicas is None:
        return run_job(job, source, tokenizer, loading.load_engine(settings))
    with closing(loading.load_cluster(settings)) as cluster:
        return run_job(job, source, tokenizer, cluster)


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
    output = settings.job.output or ""
    command = shlex.join([*program(), *given, "-m", "decode", "-i", output])
    return (
        f"{output} has token ids; this prints the answers as text (or use --output-format text):\n"
        f"    {command}"
    )


def _job(settings: Settings, tokenizer: "Tokenizer") -> "Job":
    from getp import fingerprint
    from getp.job.request_reader import RequestDefaults
    from getp.job.run import Job

    options, prompt = settings.job, settings.prompt
    defaults = loading.sampling_defaults(settings, tokenizer)
    checkpoint = loading.checkpoint_folder(settings)
    return Job(
        input=prompt.input or "",
        output=options.output or "",
        checkpoint=loading.checkpoint_name(settings),
        defaults=RequestDefaults(
            defaults.params,
            defaults.origins,
            settings.sampling.stop,
            bool(prompt.chat_template),
            prompt.system,
        ),
        seed_given=settings.sampling.seed is not None,
        identity={
            "checkpoint": fingerprint.of_checkpoint(checkpoint),
            "tokenizer": fingerprint.of_tokenizer(loading.tokenizer_path(settings)),
            "weights": "dummy" if settings.engine.dummy_weights else "the checkpoint's",
        },
        output_format=options.output_format,
        reading_hint=_reading_hint(settings),
        report=options.report,
        details=settings.details,
        restart=options.restart,
        accept_different_rounding=options.accept_different_rounding,
        flush_s=options.flush_interval,
        grace_s=options.grace,
        max_errors=options.max_errors,
        schedule=options.schedule,
        name_of=option_name,
    )
