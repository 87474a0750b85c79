"""The lengths in tokens of the requests in a file, for the prediction of a job."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from getp.checkpoints import load_tokenizer
from getp.job.formats.interface import BadRequestError, Failure, JobRequest, ParsedBody
from getp.job.formats.table import Columns
from getp.job.inputs import Part, scan
from getp.job.request_reader import RequestDefaults, RequestReader
from tokenizer import Tokenizer

_BYTES_PER_TOKEN = 4  # assumed without a tokenizer


@dataclass
class Requests:
    """The lengths of the valid requests, and the number of requests that mode getp would refuse."""

    counted: str  # how prompt tokens were counted, for the title
    prompts: list[int] = field(default_factory=list)  # tokens of each
    limits: list[int | None] = field(default_factory=list)  # maximum new tokens of each
    max_lengths: list[int | None] = field(default_factory=list)  # maximum tokens with the prompt
    refused: int = 0
    first_refused: str | None = None  # its line number and the reason


def read_requests(
    path: str,
    folder: Path | None,
    defaults: RequestDefaults,
    columns: Columns | None = None,
    first: int | None = None,
) -> Requests:
    """Read a file as mode getp does. folder: of the tokenizer; None: estimate from bytes.

    columns: of a table; first: read only that many requests.

    Raises GetpError for a file that mode getp would refuse.
    """
    source = scan(path, columns, Part(first))
    if folder is None:
        found = Requests(f"estimated at {_BYTES_PER_TOKEN} bytes per token")
        reader: RequestReader = _ByteReader(source, defaults, cast(Tokenizer, None))
    else:
        found = Requests("counted")
        reader = RequestReader(source, defaults, load_tokenizer(folder))
    for request in map(reader.read, source.lines()):
        if isinstance(request, JobRequest):
            found.prompts.append(len(request.prompt_ids))
            found.limits.append(request.params.max_new_tokens)
            found.max_lengths.append(request.params.max_positions)
        elif isinstance(request, Failure):
            found.refused += 1
            found.first_refused = found.first_refused or (
                f"{source.format.record_word} {request.line}: {request.message}"
            )
    return found


class _ByteReader(RequestReader):
    """Estimates the number of tokens from the bytes of a prompt, without a tokenizer."""

    def encode(self, body: ParsedBody, chat: bool, limit: int | None) -> list[int]:
        if isinstance(body.prompt, list):
            return body.prompt
        texts = [message.get("content") for message in body.messages or ()]
        texts += [body.prompt, self.defaults.system if chat else None]
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts if text)
        if not size:
            raise BadRequestError("empty_prompt", "the prompt is empty")
        return [0] * -(-size // _BYTES_PER_TOKEN)
