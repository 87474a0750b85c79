"""Mode score: log-likelihood and perplexity of given texts."""

from getp.cli import loading
from getp.cli.settings import Settings
from getp.cli.wording import option_name
from getp.errors import UsageProblem
from getp.files import check_writable


def run(settings: Settings) -> int:
    """Score the file; return the exit status. Raises GetpError and errors of the engine."""
    source = loading.needed(settings, settings.prompt.input, "-i/--input FILE")
    output, report = settings.job.output, settings.job.report
    if settings.sampling.given_length == 1:
        raise UsageProblem(
            "-n/--max-length must be 2 or more here: a token is scored after another"
        )
    for path, role in ((output, "output"), (report, "report")):
        if path is not None:
            check_writable(path, role, {"input": source})
    from getp.text.score import Scorer, print_summary, score_file

    tokenizer = loading.load_tokenizer(settings)
    with loading.load_engine(settings) as engine:
        scorer = Scorer(engine, tokenizer, settings.sampling.given_length, option_name)
        status = score_file(scorer, source, output, tokenizer)
    print_summary(scorer.summary(), output, report)
    return status
