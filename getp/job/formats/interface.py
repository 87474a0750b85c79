"""The interfaces of input and output formats, and the records that pass through them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, TypeAlias

from engine import Completion, SamplingParams
from getp.defaults import FormatValues
from getp.files import MAX_LINE_BYTES, iter_lines, json_line
from getp.openai.parsed import BadRequestError, ParsedBody
from getp.ownership import ERROR_KEYS
from getp.text.answer_text import PLAIN, Answer, AnswerOptions, read_answer
from getp.text.samples import Samples
from getp.text.truncate import Side
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from pyarrow import RecordBatch

Rows: TypeAlias = "Iterator[RecordBatch]"
"""The rows of a table, in batches."""


@dataclass(frozen=True, slots=True)
class Line:
    """One request, unparsed. `data` is None if the line is too long."""

    index: int  # request number, from 0
    number: int  # line number, from 1
    data: bytes | None


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A valid request, ready for the engine."""

    index: int  # request number, from 0
    line: int  # line number in the input, from 1
    custom_id: str
    prompt_ids: list[int]
    params: SamplingParams
    answer: AnswerOptions = PLAIN
    n: int = 1  # answers
    best_of: int = 1  # answers that are generated; the n most likely are returned
    truncated: Side = "none"  # where the prompt was cut


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that failed, and the reason."""

    index: int
    line: int
    custom_id: str | None  # None if the line does not contain it
    code: str
    message: str


@dataclass(frozen=True)
class ResultContext:
    """Data common to all results of a job. A resumed job keeps `fingerprint` and `created`."""

    tokenizer: Tokenizer
    model: str
    fingerprint: str  # the ids of results are derived from it
    created: int  # when the job began, in seconds since 1970

    def key(self, index: int) -> str:
        """Return the part of a result's ids that identifies the request."""
        return hashlib.blake2b(f"{self.fingerprint}/{index}".encode(), digest_size=12).hexdigest()

    def answer(self, request: JobRequest, completion: Completion) -> Answer:
        """Return the parts of the answer. Raises TokenizerError."""
        return read_answer(
            self.tokenizer,
            completion.token_ids,
            request.prompt_ids,
            request.answer,
            completion.stop_id,
        )


class OutputFormat(ABC):
    """A format of results."""

    name: ClassVar[str]  # for the user, and part of the job's fingerprint
    suffix: ClassVar[str]  # of files in this format
    # Whether results include failures; otherwise a failed request is an empty line, and its
    # failure is written to the errors file.
    holds_failures: ClassVar[bool] = False

    @abstractmethod
    def completed(self, context: ResultContext, request: JobRequest, samples: Samples) -> bytes:
        """Return the line of a request that succeeded. Raises ValueError for NaN in JSON."""

    def failed(self, context: ResultContext, failure: Failure) -> bytes:
        """Return the line of a request that failed: of the result or of the errors file."""
        values = failure.line, failure.index, failure.code, failure.message
        return json_line(dict(zip(ERROR_KEYS, values, strict=True)))

    def write(
        self, file: BinaryIO, results: Iterable[tuple[bool, bytes]], rows: "Rows | None"
    ) -> None:
        """Write the results, in input order; each is whether it succeeded, and its line.

        rows: the rows of the input with all their columns, if it is a table.
        """
        for ok, line in results:
            file.write((line if ok or self.holds_failures else b"") + b"\n")


class InputFormat(ABC):
    """A format of requests. A record (in text formats: a line) holds at most one request."""

    name: ClassVar[str]  # part of the job's fingerprint
    suffix: ClassVar[str]  # of files in this format
    has_ids: ClassVar[bool]  # whether requests have their own ids, which must be unique
    has_messages: ClassVar[bool]  # whether a request can be a conversation instead of a text
    output: ClassVar[OutputFormat]  # the format of results on standard output
    record_word: ClassVar[str] = "line"  # what messages call a record
    may_be_shard: ClassVar[bool] = False  # whether several files can make up one input
    defaults: ClassVar[FormatValues]  # what holds where nothing else does
    openai_defaults: ClassVar[FormatValues | None] = None  # for requests in OpenAI's format
    # Whether prompts are scored, without answers; results are then always in the format `output`.
    only_scores: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, start: bytes) -> bool:
        """Return whether a file that starts with these bytes is in this format."""

    def records(self, file: BinaryIO, name: str) -> Iterator[bytes | None]:
        """Yield every record of the file; None stands for a record that is too long.

        name: of the file, for messages. Raises GetpError, OSError.
        """
        return iter_lines(file)

    def batches(self, file: BinaryIO, name: str) -> "Rows | None":
        """Return the rows with all their columns if this is a table; otherwise None."""
        return None

    def announced_count(self, name: str, first: bytes | None) -> int | None:
        """Return the number of requests that the first record announces, or None without one.

        name: of the file, for messages. Raises GetpError for an invalid first record.
        """
        return None

    @abstractmethod
    def is_request(self, number: int, data: bytes | None) -> bool:
        """Return whether record `number` (from 1) holds a request."""

    @abstractmethod
    def identify(self, line: Line) -> tuple[str, Any]:
        """Return the id of a request and the record for `parse`. Raises BadRequestError."""

    @abstractmethod
    def parse(self, line: Line, record: Any) -> ParsedBody:
        """Return the request's body; `record` is from `identify`. Raises BadRequestError."""


def decode_line(line: Line, what: str) -> str:
    """Return the text of a line, called `what` in the message. Raises BadRequestError."""
    if line.data is None:
        raise BadRequestError(
            "line_too_long", f"the line is longer than {MAX_LINE_BYTES >> 20} MiB"
        )
    try:
        return line.data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequestError("invalid_utf8", f"the {what} is not valid UTF-8") from None
