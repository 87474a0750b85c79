"""The run of a batch in this process: a job whose requests the engine's thread takes one by one."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, BinaryIO

from engine import Completion, Request
from getp.errors import GetpError
from getp.files import json_line
from getp.job.formats.interface import Failure, JobRequest, Line
from getp.job.formats.jsonl import Jsonl
from getp.job.inputs import Source, scan
from getp.job.job import Job, open_journal
from getp.job.job_requests import MAX_PREFETCHED_TOKENS, JobRequests, prefetch_cost
from getp.job.ordering import order_for_throughput
from getp.job.prefetch import Prefetcher
from getp.openai.parsed import BadRequestError, ParsedBody
from getp.serve.engine_thread import ServeEngine
from tokenizer import Tokenizer


class _BatchLines(Jsonl):
    """JSONL whose requests all have the endpoint of their batch."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    def parse(self, line: Line, record: dict[str, Any]) -> ParsedBody:
        url = record.get("url")
        if url != self._endpoint:
            raise BadRequestError(
                "mismatched_url", f"'url' must be the batch's endpoint {self._endpoint!r}"
            )
        return super().parse(line, record)


class BatchRun:
    """A batch's input, its journal, and its requests in the engine.

    `take` and `record` are for the engine's thread.
    """

    def __init__(self, job: Job, endpoint: str, tokenizer: Tokenizer, engine: ServeEngine) -> None:
        """Read the input and the journal. Raises GetpError."""
        source = scan(job.input)
        if not source.total:
            raise GetpError("the input file has no requests")
        self._source: Source = replace(source, format=_BatchLines(endpoint))
        self.journal = open_journal(job, self._source, engine)
        self._requests = JobRequests(job, self._source, tokenizer, self.journal)
        self._prefetcher: Prefetcher[JobRequest | Failure] = Prefetcher(
            self._requests.read(engine.max_positions),
            prefetch_cost,
            MAX_PREFETCHED_TOKENS,
            order_for_throughput,
        )
        self._prefetcher.__enter__()
        self._found = self._prefetcher.poll()
        self._samples: Iterator[Request] = iter(())
        self.in_engine: dict[int, int] = {}  # id in the engine → id in the job
        self.exhausted = False  # every request was taken
        self.stopped = False  # no more requests are taken
        self.error: str | None = None  # why it cannot go on

    @property
    def active(self) -> bool:
        """Whether there are requests to take, now or soon."""
        return not (self.exhausted or self.stopped or self.error)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do in the engine."""
        return not self.in_engine and (self.stopped or self.journal.done == self.journal.total)

    def take(self, number: int) -> Request | None:
        """Return the next request, if one is ready; number: its id in the engine."""
        try:
            return self._take(number)
        except Exception as error:  # of the disk, for example: other requests are not affected
            self.error = str(error)
            return None

    def _take(self, number: int) -> Request | None:
        while self.active:
            request = next(self._samples, None)
            if request is not None:
                self.in_engine[number] = request.request_id
                return request
            try:
                item = next(self._found)
            except StopIteration:
                self.exhausted = True
                break
            if item is None:
                break
            self._samples = self._requests.start(item)
        return None

    def record(self, completion: Completion) -> None:
        """Save what the engine completed; `request_id` is the id in the engine."""
        local = self.in_engine.pop(completion.request_id)
        if completion.finish_reason == "cancelled":
            return
        try:
            self._requests.record(replace(completion, request_id=local))
        except Exception as error:
            self.error = str(error)

    def write(self, file: BinaryIO, ok: bool) -> None:
        """Write the results of requests that succeeded, or of those that failed."""
        for index in self.journal.indices:
            if index in self.journal:
                found, line = self.journal.read(index)
                if found == ok:
                    file.write(line + b"\n")

    def write_unfinished(self, file: BinaryIO, error: Mapping[str, str]) -> None:
        """Write this error for each request that has no result."""
        for line in self._source.lines():
            if line.index not in self.journal:
                custom_id = _custom_id(line)
                record = {"id": f"batch_req_{line.index}", "custom_id": custom_id}
                file.write(json_line({**record, "response": None, "error": dict(error)}) + b"\n")

    def close(self) -> None:
        """Stop reading, and release the journal."""
        self.stopped = True
        self._prefetcher.__exit__(None, None, None)
        self.journal.close()


def _custom_id(line: Line) -> str | None:
    try:
        found = json.loads(line.data or b"").get("custom_id")
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) else None
