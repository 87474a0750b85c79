"""The main job: read → warm_up → inference → finish → write → report."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from typing import Any

from getp.errors import SOME_FAILED, Interrupted
from getp.files import STDIO, is_stream, write_report
from getp.job.formats import TOKEN_LINES
from getp.job.formats.interface import Failure, JobRequest
from getp.job.inputs import Source
from getp.job.job import Job, open_journal, print_defaults, read
from getp.job.job_engine import JobEngine
from getp.job.job_requests import MAX_PREFETCHED_TOKENS, JobRequests, prefetch_cost
from getp.job.journal import Journal
from getp.job.ordering import order_for_throughput
from getp.job.prefetch import Prefetcher
from getp.job.progress import progress
from getp.job.results import write_results
from getp.job.signals import GraceExpired, GracefulStop
from getp.ownership import errors_path
from getp.report import html_report
from getp.report.job_report import job_report
from getp.report.report_table import final_line, print_report
from getp.terminal import print_last_line, print_message
from getp.text.evaluate import check_agreement, compare
from getp.text.prompts import chat_template
from getp.text.result_file import read_results
from getp.units import counted
from tokenizer import Tokenizer

__all__ = ["Job", "JobRun", "read", "run_job"]


def run_job(job: Job, source: Source, tokenizer: Tokenizer, engine: JobEngine) -> int:
    """Run the whole job; return the exit status. Raises Interrupted when a signal ends it."""
    if job.defaults.answer.chat:
        chat_template(tokenizer)  # raises one error instead of one per request
    run, failed, first_failure = complete(job, source, tokenizer, engine)
    agreement = _agreement(run)
    _report(run, failed, first_failure, agreement)
    check_agreement(agreement, job.required_agreement)
    return SOME_FAILED if failed else 0


def complete(
    job: Job, source: Source, tokenizer: Tokenizer, engine: JobEngine
) -> "tuple[JobRun, int, bytes | None]":
    """Complete all requests and write the results. Raises Interrupted when a signal ends it.

    Returns the run, how many requests failed, and the line of the first of them.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(GracefulStop(job.grace_s))
        journal = stack.enter_context(open_journal(job, source, engine))
        if not source.format.only_scores:
            print_defaults(job, source, journal.header["seed"])
        run = JobRun(job, source, tokenizer, engine, journal, stop)
        try:
            run.complete_requests()
        except (KeyboardInterrupt, Interrupted):
            raise stop.interrupted(f"interrupted: {run.resume_hint()}") from None
        except Exception:
            if journal.done:
                print_message(f"getp: {run.resume_hint()}")
            raise
        first_failure = write_results(journal, source, job.output, run.requests.format)
        journal.remove()
    return run, journal.failed, first_failure


class JobRun:
    """The run of a job in this process: every request that an earlier run did not finish."""

    def __init__(
        self, job: Job, source: Source, tokenizer: Tokenizer, engine: JobEngine,
        journal: Journal, stop: GracefulStop,
    ) -> None:  # fmt: skip
        self.job = job
        self.source = source
        self.engine = engine
        self.tokenizer = tokenizer
        self.requests = JobRequests(job, source, tokenizer, journal, stop.check)
        self.measured = self.requests.measured
        self._journal = journal
        self._stop = stop

    def complete_requests(self) -> None:
        """Complete every request that is not done. Raises Interrupted, GetpError."""
        if self._journal.done == self.source.total:
            return
        arrange = order_for_throughput if self.job.schedule == "throughput" else None
        read = self.requests.read(self.engine.model_config.max_positions)
        with Prefetcher(read, prefetch_cost, MAX_PREFETCHED_TOKENS, arrange) as requests:
            self.measured.warm_up_s = _seconds(self.engine.warm_up)
            try:
                self._stop.allow_grace = True
                self.measured.inference_s = _seconds(lambda: self._run_inference(requests))
            finally:
                self._stop.allow_grace = False
                self.measured.finish_s = _seconds(self.engine.finish)
        if self._journal.done < self.source.total:
            raise self._stop.interrupted("stopped")

    def resume_hint(self) -> str:
        """Return what is saved after a run that ended early, and how to resume it."""
        done = f"{self._journal.done} of {self.source.total} requests are done"
        name_of, limit = self.job.name_of, self.job.max_errors
        if is_stream(self.job.output):
            return (
                f"{done}, not saved: a job can be resumed only if {name_of('output')} is a "
                "regular file"
            )
        if not self._journal.in_place:
            path = self._journal.path
            return f"{done}, not saved: {path} was deleted or replaced while the job ran"
        remedy = "the same command resumes the job"
        if limit is not None and self._journal.failed > limit:
            remedy = f"raise {name_of('max_errors')} to resume, or start over with "
            remedy += name_of("restart")
        return f"{done} and saved in {self._journal.path}; {remedy}"

    def _run_inference(self, requests: Prefetcher[JobRequest | Failure]) -> None:
        """Run every request through the engine, which admits requests as it has room."""
        stats, note = lambda: self.engine.stats, self.measured.history.sample
        with progress(self._journal, stats, note):
            found = requests.until(lambda: self._stop.requested)
            started = chain.from_iterable(map(self.requests.start, found))
            completions = self.engine.generate(started)
            try:
                for completion in completions:
                    self.requests.record(completion)
            except GraceExpired:
                return
            finally:
                if isinstance(completions, Iterator) and hasattr(completions, "close"):
                    completions.close()


def _agreement(run: JobRun) -> dict[str, Any] | None:
    """Return how far the results agree with the reference, if there is one."""
    job = run.job
    if job.reference is None:
        return None
    results, reference = read_results(job.output), read_results(job.reference)
    return {"file": job.reference, **asdict(compare(results, reference, lambda: run.tokenizer))}


def _report(
    run: JobRun, failed: int, first_failure: bytes | None, agreement: dict[str, Any] | None
) -> None:
    """Print the report, and write it to the report file if there is one."""
    job = run.job
    if first_failure is not None and not is_stream(job.output):
        where = job.output if run.requests.format.holds_failures else errors_path(job.output)
        record = json.loads(first_failure)
        error = record.get("error", record)  # JSONL results have the failure under "error"
        print_message(
            f"getp: {failed} of {run.source.total} requests failed: see {where}; the first is "
            f"{run.source.format.record_word} {error['line']}: {error['message']}"
        )
    if run.measured.cut_prompts:
        prompts = counted(run.measured.cut_prompts, "prompt")
        print_message(f"getp: cut to the limit by {job.name_of('truncate')}: {prompts}")
    report = job_report(run.measured, run.engine.summary(), job.checkpoint, job.price)
    report["agreement"] = agreement
    if job.report is not None and job.report.endswith(html_report.SUFFIX):
        html_report.write_html(job.report, report, run.measured)
    elif job.report is not None:
        write_report(job.report, report)
    print_report(report, job.details)
    has_answers = failed < run.source.total and not is_stream(job.output)
    if job.reading_hint is not None and run.requests.format is TOKEN_LINES and has_answers:
        print_message(f"getp: {job.reading_hint}")
    # If standard output holds the results or the report, it must stay parseable.
    line = final_line(run.measured)
    if STDIO in (job.output, job.report):
        print_message(line)
    else:
        print_last_line(line)


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
