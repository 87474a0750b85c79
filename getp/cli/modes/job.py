"""Mode getp: a job on a file of prompts."""

from contextlib import closing
from typing import TYPE_CHECKING

from getp.cli import loading
from getp.cli.settings import Settings
from getp.cli.wording import option_name
from getp.errors import UsageProblem

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
    if settings.parallel.replicas is None:
        return run_job(job, source, tokenizer, loading.load_engine(settings))
    with closing(loading.load_cluster(settings)) as cluster:
        return run_job(job, source, tokenizer, cluster)


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
        report=options.report,
        restart=options.restart,
        flush_s=options.flush_interval,
        grace_s=options.grace,
        max_errors=options.max_errors,
        schedule=options.schedule,
        name_of=option_name,
    )
