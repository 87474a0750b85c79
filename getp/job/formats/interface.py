"""What an input format and an output format are. A format is one module with a `FORMAT`."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar

from engine import Completion, SamplingParams
from getp.files import MAX_LINE_BYTES, iter_lines
from tokenizer import Message, Tokenizer


class BadRequestError(Exception):
    """A request that cannot run as it is; other requests are not affected."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Line:
    """One request as it is in the input. `data` is None if the line is too long."""

    index: int  # of the request, from 0
    number: int  # of the line, from 1
    data: bytes | None


@dataclass
class ParsedBody:
    """What a request asks for."""

    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    params: dict[str, Any] = field(default_factory=dict)  # the SamplingParams that it sets
    stops: tuple[str, ...] | None = None  # None: the job's
    variables: dict[str, Any] = field(default_factory=dict)  # for the chat template
    chat: bool | None = None  # through the chat template; None: the job's default


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A request that can run."""

    index: int  # in the job, from 0
    line: int  # of the input, from 1
    custom_id: str
    prompt_ids: list[int]
    params: SamplingParams
    stops: tuple[str, ...] = ()
    chat: bool = False  # the prompt came from the chat template


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
    """What all results of a job share. `fingerprint` and `created` survive a resumed job."""

    tokenizer: Tokenizer
    model: str
    fingerprint: str  # the ids of results are derived from it
    created: int  # when the job began, in seconds since 1970

    def key(self, index: int) -> str:
        """Return the part of a result's ids that identifies the request."""
        return hashlib.blake2b(f"{self.fingerprint}/{index}".encode(), digest_size=12).hexdigest()


class OutputFormat(ABC):
    """How results are written."""

    name: ClassVar[str]  # part of the job's fingerprint
    suffix: ClassVar[str]  # of files in this format
    holds_failures: ClassVar[bool]  # else a failed request is an empty line, and in the errors file

    @abstractmethod
    def completed(
        self, context: ResultContext, request: JobRequest, completion: Completion
    ) -> bytes:
        """Return the line of a request that succeeded. Raises ValueError for NaN in JSON."""

    @abstractmethod
    def failed(self, context: ResultContext, failure: Failure) -> bytes:
        """Return the line of a request that failed: of the result or of the errors file."""


class InputFormat(ABC):
    """How requests are read. A record (of text formats: a line) holds at most one request."""

    name: ClassVar[str]  # part of the job's fingerprint
    suffix: ClassVar[str]  # of files in this format
    has_ids: ClassVar[bool]  # requests bring their own ids, which must differ
    output: ClassVar[OutputFormat]  # the format of results on standard output

    @abstractmethod
    def recognises(self, start: bytes) -> bool:
        """Return whether a file that starts with these bytes is in this format."""

    def records(self, file: BinaryIO) -> Iterator[bytes | None]:
        """Yield every record of the file; None stands for one that is too long."""
        return iter_lines(file)

    def announced(self, name: str, first: bytes | None) -> int | None:
        """Return the number of requests that the first record announces; None: it does not.

        Raises GetpError, naming the file by `name`, for a first record that is wrong.
        """
        return None

    @abstractmethod
    def is_request(self, number: int, data: bytes | None) -> bool:
        """Return whether record `number` (from 1) holds a request."""

    @abstractmethod
    def identify(self, line: Line) -> tuple[str, Any]:
        """Return the id of a request, and what `parse` needs. Raises BadRequestError."""

    @abstractmethod
    def parse(self, line: Line, record: Any) -> ParsedBody:
        """Return what a request asks for; `record` is from `identify`. Raises BadRequestError."""


def decoded(line: Line, what: str) -> str:
    """Return the text of a line, called `what` in the message. Raises BadRequestError."""
    if line.data is None:
        raise BadRequestError(
            "line_too_long", f"the line is longer than {MAX_LINE_BYTES >> 20} MiB"
        )
    try:
        return line.data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequestError("invalid_utf8", f"the {what} is not valid UTF-8") from None
