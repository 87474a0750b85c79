"""The main job: read → warm_up → inference → finish → write → report."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from engine import Completion, Request
from getp.errors import SOME_FAILED, GetpError, Interrupted, worded
from getp.files import STDIO, is_stream, write_report
from getp.job.formats import TOKEN_LINES, output_format
from getp.job.formats.interface import Failure, JobRequest, ResultContext
from getp.job.inputs import Source
from getp.job.job import Job, open_journal, print_defaults, read
from getp.job.job_engine import JobEngine
from getp.job.journal import Journal
from getp.job.ordering import order_for_throughput
from getp.job.prefetch import Prefetcher
from getp.job.progress import progress
from getp.job.request_reader import RequestReader
from getp.job.results import write_results
from getp.job.signals import GraceExpired, GracefulStop
from getp.ownership import errors_path
from getp.report import html_report
from getp.report.job_report import job_report
from getp.report.measurements import Measurements
from getp.report.report_table import final_line, print_report
from getp.terminal import print_last_line, print_message
from getp.text.answer_text import StopWatcher
from getp.text.evaluate import check_agreement, compare
from getp.text.prompts import chat_template
from getp.text.result_file import read_results
from getp.text.samples import choose_samples, sample_params
from getp.units import counted
from tokenizer import Tokenizer

__all__ = ["Job", "JobRun", "read", "run_job"]

_MAX_PREFETCHED_TOKENS = 1 << 19  # prompt tokens that are encoded ahead of the engine
_INDEX_BITS = 40  # of a request in the ids of its answers
_TOKENS_PER_REQUEST = 64  # cost of a queued request besides its prompt


def run_job(job: Job, source: Source, tokenizer: Tokenizer, engine: JobEngine) -> int:
    """Run the whole job; return the exit status. Raises Interrupted when a signal ends it."""
    if job.defaults.answer.chat:
        chat_template(tokenizer)  # raises one error instead of one per request
    with ExitStack() as stack:
        stop = stack.enter_context(GracefulStop(job.grace_s))
        journal = stack.enter_context(open_journal(job, source, engine))
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
        first_failure = write_results(journal, source, job.output, run.format)
        journal.remove()
    agreement = _agreement(run)
    _report(run, journal.failed, first_failure, agreement)
    check_agreement(agreement, job.required_agreement)
    return SOME_FAILED if journal.failed else 0


@dataclass
class _Running:
    """A request in the engine, and those of its answers that are complete, by their number."""

    request: JobRequest
    watchers: list[StopWatcher] = field(default_factory=list)
    completions: dict[int, Completion] = field(default_factory=dict)


class JobRun:
    """The run of a job in this process: every request that an earlier run did not finish."""

    def __init__(
        self, job: Job, source: Source, tokenizer: Tokenizer, engine: JobEngine,
        journal: Journal, stop: GracefulStop,
    ) -> None:  # fmt: skip
        self.job = job
        self.source = source
        self.engine = engine
        self.measured = Measurements(resumed=journal.done, ignored=source.ignored)
        self.format = output_format(job.output, source.format, job.output_format)
        self.tokenizer = tokenizer
        self._journal = journal
        self._stop = stop
        header = journal.header
        params = replace(job.defaults.params, seed=header["seed"])
        self._defaults = replace(job.defaults, params=params)
        fingerprint = json.dumps(header["fingerprint"], sort_keys=True)
        self._results = ResultContext(tokenizer, job.checkpoint, fingerprint, header["created"])
        self._running: dict[int, _Running] = {}

    def complete_requests(self) -> None:
        """Complete every request that is not done. Raises Interrupted, GetpError."""
        if self._journal.done == self.source.total:
            return
        arrange = order_for_throughput if self.job.schedule == "throughput" else None
        with Prefetcher(self._read(), _prefetch_cost, _MAX_PREFETCHED_TOKENS, arrange) as requests:
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

    def _read(self) -> Iterator[JobRequest | Failure]:
        """Read the requests that are not done. Runs in the prefetching thread."""
        reader = RequestReader(
            self.source,
            self._defaults,
            self.tokenizer,
            datetime.fromtimestamp(self._journal.header["created"]),
            self.engine.model_config.max_positions,
            self.job.name_of,
        )
        with closing(self.source.lines()) as lines:
            for line in lines:
                request = reader.read(line, needed=line.index not in self._journal)
                if request is not None and line.index not in self._journal:
                    yield request

    def _run_inference(self, requests: Prefetcher[JobRequest | Failure]) -> None:
        """Run every request through the engine, which admits requests as it has room."""
        stats, note = lambda: self.engine.stats, self.measured.history.sample
        with progress(self._journal, stats, note):
            engine_requests = self._engine_requests(requests.until(lambda: self._stop.requested))
            completions = self.engine.generate(engine_requests)
            try:
                for completion in completions:
                    self._record_completion(completion)
            except GraceExpired:
                return
            finally:
                if isinstance(completions, Iterator) and hasattr(completions, "close"):
                    completions.close()

    def _engine_requests(self, requests: Iterator[JobRequest | Failure]) -> Iterator[Request]:
        """Yield the valid requests for the engine; record the failures of the others."""
        for request in requests:
            if isinstance(request, Failure):
                self._record_failure(request)
                continue
            yield from self._samples(request)

    def _samples(self, request: JobRequest) -> Iterator[Request]:
        """Yield the engine's requests for the answers of a request, which share its prompt."""
        self._running[request.index] = running = _Running(request)
        self.measured.cut_prompts += request.truncated != "none"
        for number in range(request.best_of):
            watcher = StopWatcher(
                self.tokenizer, request.prompt_ids, request.answer, self._stop.check
            )
            running.watchers.append(watcher)
            params = sample_params(request.params, number, request.n, request.best_of)
            sample_id = request.index + (number << _INDEX_BITS)
            yield Request(request.prompt_ids, params, sample_id, watcher)

    def _record_completion(self, completion: Completion) -> None:
        """Save a request in the journal when its last answer is complete, in any order."""
        number, index = divmod(completion.request_id, 1 << _INDEX_BITS)
        running = self._running[index]
        running.completions[number] = completion
        if len(running.completions) < running.request.best_of:
            return
        del self._running[index]
        request = running.request
        completions = [running.completions[i] for i in range(request.best_of)]
        failure = self._failure_of(running, completions)
        if failure is None:
            with_logprobs = request.params.logprobs is not None
            samples = choose_samples(completions, request.n, with_logprobs)
            try:
                line = self.format.completed(self._results, request, samples)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                failure = _failure(request, "internal_error", reason)
        if failure is not None:
            return self._record_failure(failure)
        self._journal.append(request.index, True, line)
        self.measured.add(completions)

    def _failure_of(self, running: "_Running", completions: list[Completion]) -> Failure | None:
        """Return the failure of the first answer that failed."""
        for completion, watcher in zip(completions, running.watchers, strict=True):
            if completion.finish_reason in ("error", "cancelled"):
                message = "the request was cancelled"
                if completion.error is not None:
                    message = worded(completion.error, self.job.name_of)
                code = f"request_{completion.finish_reason}"
                return _failure(running.request, code, message)
            if watcher.error is not None:
                return _failure(running.request, "internal_error", watcher.error)
        return None

    def _record_failure(self, failure: Failure) -> None:
        """Save a failed request. Raises GetpError after too many of them."""
        self._journal.append(failure.index, False, self.format.failed(self._results, failure))
        self.measured.failed += 1
        limit = self.job.max_errors
        if limit is not None and self._journal.failed > limit:
            raise GetpError(
                "failed requests: {failed}, more than {max_errors} {limit}; the last one: {word} "
                "{number}: {reason}",
                word=self.source.format.record_word,
                failed=self._journal.failed,
                limit=limit,
                number=failure.line,
                reason=failure.message,
            )


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
        where = job.output if run.format.holds_failures else errors_path(job.output)
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
    if job.reading_hint is not None and run.format is TOKEN_LINES and has_answers:
        print_message(f"getp: {job.reading_hint}")
    # If standard output holds the results or the report, it must stay parseable.
    line = final_line(run.measured)
    if STDIO in (job.output, job.report):
        print_message(line)
    else:
        print_last_line(line)


def _failure(request: JobRequest, code: str, message: str) -> Failure:
    return Failure(request.index, request.line, request.custom_id, code, message)


def _prefetch_cost(request: JobRequest | Failure) -> int:
    tokens = len(request.prompt_ids) if isinstance(request, JobRequest) else 0
    return tokens + _TOKENS_PER_REQUEST


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
