"""The requests of a job: read from its input, given to an engine, recorded in its journal."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime

from engine import Completion, Request
from getp.errors import GetpError, worded
from getp.job.formats import output_format
from getp.job.formats.interface import Failure, JobRequest, ResultContext
from getp.job.inputs import Source
from getp.job.job import Job
from getp.job.journal import Journal
from getp.job.request_reader import RequestReader
from getp.report.measurements import Measurements
from getp.text.answer_text import StopWatcher
from getp.text.samples import choose_samples, sample_params
from tokenizer import Tokenizer

MAX_PREFETCHED_TOKENS = 1 << 19
"""Prompt tokens that are encoded ahead of the engine."""

_INDEX_BITS = 40  # of a request in the ids of its answers
_TOKENS_PER_REQUEST = 64  # cost of a queued request besides its prompt


@dataclass
class _Running:
    """A request in the engine, and those of its answers that are complete, by their number."""

    request: JobRequest
    watchers: list[StopWatcher] = field(default_factory=list)
    completions: dict[int, Completion] = field(default_factory=dict)


class JobRequests:
    """Every request of a job that no earlier run finished; see `JobRun` and the server."""

    def __init__(
        self, job: Job, source: Source, tokenizer: Tokenizer, journal: Journal,
        check: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """check: is called for every token and may raise."""
        self.measured = Measurements(resumed=journal.done, ignored=source.ignored)
        self.format = output_format(job.output, source.format, job.output_format)
        self._job, self._source, self._journal = job, source, journal
        self._tokenizer, self._check = tokenizer, check
        header = journal.header
        params = replace(job.defaults.params, seed=header["seed"])
        self._defaults = replace(job.defaults, params=params)
        fingerprint = json.dumps(header["fingerprint"], sort_keys=True)
        self._results = ResultContext(tokenizer, job.checkpoint, fingerprint, header["created"])
        self._running: dict[int, _Running] = {}

    def read(self, max_positions: int) -> Iterator[JobRequest | Failure]:
        """Read the requests that are not done; may run in a thread of its own.

        max_positions: the model's limit.
        """
        reader = RequestReader(
            self._source,
            self._defaults,
            self._tokenizer,
            datetime.fromtimestamp(self._journal.header["created"]),
            max_positions,
            self._job.name_of,
        )
        with closing(self._source.lines()) as lines:
            for line in lines:
                request = reader.read(line, needed=line.index not in self._journal)
                if request is not None and line.index not in self._journal:
                    yield request

    def start(self, request: JobRequest | Failure) -> Iterator[Request]:
        """Yield the engine's requests for the answers of a request, which share its prompt.

        There are none for a failure, which is recorded.
        """
        if isinstance(request, Failure):
            self.record_failure(request)
            return
        self._running[request.index] = running = _Running(request)
        self.measured.cut_prompts += request.truncated != "none"
        for number in range(request.best_of):
            watcher = StopWatcher(self._tokenizer, request.prompt_ids, request.answer, self._check)
            running.watchers.append(watcher)
            params = sample_params(request.params, number, request.n, request.best_of)
            sample_id = request.index + (number << _INDEX_BITS)
            yield Request(request.prompt_ids, params, sample_id, watcher)

    def record(self, completion: Completion) -> None:
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
            return self.record_failure(failure)
        self._journal.append(request.index, True, line)
        self.measured.add(completions)

    def _failure_of(self, running: "_Running", completions: list[Completion]) -> Failure | None:
        """Return the failure of the first answer that failed."""
        for completion, watcher in zip(completions, running.watchers, strict=True):
            if completion.finish_reason in ("error", "cancelled"):
                message = "the request was cancelled"
                if completion.error is not None:
                    message = worded(completion.error, self._job.name_of)
                code = f"request_{completion.finish_reason}"
                return _failure(running.request, code, message)
            if watcher.error is not None:
                return _failure(running.request, "internal_error", watcher.error)
        return None

    def record_failure(self, failure: Failure) -> None:
        """Save a failed request. Raises GetpError after too many of them."""
        self._journal.append(failure.index, False, self.format.failed(self._results, failure))
        self.measured.failed += 1
        limit = self._job.max_errors
        if limit is not None and self._journal.failed > limit:
            raise GetpError(
                "failed requests: {failed}, more than {max_errors} {limit}; the last one: {word} "
                "{number}: {reason}",
                word=self._source.format.record_word,
                failed=self._journal.failed,
                limit=limit,
                number=failure.line,
                reason=failure.message,
            )


def _failure(request: JobRequest, code: str, message: str) -> Failure:
    return Failure(request.index, request.line, request.custom_id, code, message)


def prefetch_cost(request: JobRequest | Failure) -> int:
    """Return what a request costs in memory while it waits, in tokens."""
    tokens = len(request.prompt_ids) if isinstance(request, JobRequest) else 0
    return tokens + _TOKENS_PER_REQUEST
