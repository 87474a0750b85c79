"""Mode score: log-likelihood and perplexity of given texts."""

import os
from contextlib import closing

from getp.cli import loading
from getp.cli.settings import Settings
from getp.cli.wording import option_name
from getp.errors import UsageProblem
from getp.files import check_writable


def run(settings: Settings) -> int:
    """Score the file; return the exit status. Raises GetpError and errors of the engine."""
    source = loading.needed(settings, settings.prompt.input, "-i/--input FILE")
    loading.check_json_report(settings)
    options, length = settings.job, settings.sampling.given_length
    if length == 1:
        raise UsageProblem(
            "-n/--max-length must be 2 or more here: a token is scored after another"
        )
    for path, role in ((options.output, "output"), (options.report, "report")):
        if path is not None:
            check_writable(path, role, {"input": source})
    from engine import SamplingParams
    from getp.files import open_input
    from getp.job.input_files import input_files
    from getp.job.job import Job
    from getp.job.request_reader import RequestDefaults
    from getp.score.run import score_file

    with open_input(input_files(source)[0]):
        pass  # before the model is loaded
    tokenizer = loading.load_tokenizer(settings)
    job = Job(
        input=source,
        output=options.output or os.devnull,
        checkpoint=loading.checkpoint_name(settings),
        defaults=RequestDefaults(SamplingParams(seed=0)),
        identity=loading.identity(settings),
        report=options.report,
        restart=options.restart,
        accept_different_rounding=options.accept_different_rounding,
        flush_s=options.flush_interval,
        grace_s=options.grace,
        max_errors=options.max_errors,
        name_of=option_name,
    )
    if settings.parallel.replicas is None:
        return score_file(job, tokenizer, loading.load_engine(settings), length)
    with closing(loading.load_cluster(settings)) as cluster:
        return score_file(job, tokenizer, cluster, length)
