"""Scores the texts of a file, as a job."""

from dataclasses import replace
from typing import Any

from getp.errors import SOME_FAILED
from getp.files import STDIO, write_report
from getp.job.job import Job, choose_kernels, read
from getp.job.job_engine import JobEngine
from getp.job.run import complete
from getp.score.formats import ScoreResults, ScoreTexts
from getp.terminal import print_last_line, print_message, warn
from getp.units import counted
from tokenizer import Tokenizer


def score_file(job: Job, tokenizer: Tokenizer, engine: JobEngine, length: int | None) -> int:
    """Score the job's input; return the exit status.

    length: tokens of a window; None: as many as the engine allows. Raises GetpError and the errors
    of the engine.
    """
    choose_kernels(job, engine)
    try:
        engine.warm_up()
        length = min(length or engine.max_positions, engine.max_positions)
        results = ScoreResults()
        params = replace(job.defaults.params, max_positions=length)
        defaults = replace(job.defaults, params=params)
        job = replace(job, format=ScoreTexts(tokenizer, length, results), defaults=defaults)
        complete(job, read(job), tokenizer, engine)
    finally:
        engine.finish()
    totals = results.totals
    if totals.first_error is not None:
        texts = counted(totals.texts, "text")
        warn(f"{totals.failed} of {texts} failed; the first is {totals.first_error}")
    _print_summary(totals.summary(), job.output, job.report)
    return SOME_FAILED if totals.failed else 0


def _print_summary(summary: dict[str, Any], output: str, report: str | None) -> None:
    """Print the totals, and write them to the report file if there is one."""
    if report is not None:
        write_report(report, summary)
    shown = "unknown" if summary["perplexity"] is None else f"{summary['perplexity']:.6g}"
    line = (
        f"texts: {summary['texts']} ({summary['failed']} failed), tokens scored: "
        f"{summary['tokens']}, log-likelihood: {summary['logprob']:.6f}, perplexity: {shown}"
    )
    (print_message if STDIO in (output, report) else print_last_line)(line)
