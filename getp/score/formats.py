"""The input and the results of mode score, as formats of a job.

Each text is scored in windows that the model can hold; a later window repeats the second half of
the one before, so that each token is scored once and has at least half a window before it. Each
window is a request of the job.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, BinaryIO, ClassVar

from getp.defaults import FormatValues
from getp.errors import GetpError
from getp.files import STDIO, iter_lines, json_line, path_name
from getp.job.formats.interface import (
    Failure,
    InputFormat,
    JobRequest,
    Line,
    OutputFormat,
    ResultContext,
    Rows,
)
from getp.openai.parsed import BadRequestError, ParsedBody
from getp.text.samples import Samples
from tokenizer import Tokenizer, TokenizerError

_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", path_name(STDIO))
# The id of a window is that of its text after one of these.
_LAST, _OTHER = ".", "-"


@dataclass
class Totals:
    """What is known about all texts."""

    texts: int = 0
    failed: int = 0
    tokens: int = 0
    logprob: float = 0.0
    greedy: int = 0
    first_error: str | None = None

    def add(self, result: dict[str, Any]) -> None:
        """Add the result of a text."""
        self.texts += 1
        if "error" in result:
            self.failed += 1
            self.first_error = self.first_error or result["error"]
            return
        self.tokens += result["tokens"]
        self.logprob += result["logprob"]
        self.greedy += result["is_greedy"]

    def summary(self) -> dict[str, Any]:
        """Return the totals, for the report."""
        return {
            "texts": self.texts,
            "failed": self.failed,
            "tokens": self.tokens,
            "logprob": self.logprob,
            "perplexity": perplexity(self.logprob, self.tokens),
            "greedy": self.greedy,
        }


class ScoreResults(OutputFormat):
    """One line for each text, in JSON; the journal has one for each window."""

    name, suffix, holds_failures = "scores", ".jsonl", True

    def __init__(self) -> None:
        self.totals = Totals()  # of the results that are written

    def completed(self, context: ResultContext, request: JobRequest, samples: Samples) -> bytes:
        """Return the scores of a window."""
        entries, first = samples.prompt_logprobs, request.params.prompt_logprobs_from
        most_likely = [entry.top[0][0] for entry in entries]
        return json_line(
            {
                "id": request.custom_id,
                "tokens": len(entries),
                "logprob": math.fsum(entry.logprob for entry in entries),
                "is_greedy": most_likely == request.prompt_ids[first:],
            }
        )

    def failed(self, context: ResultContext, failure: Failure) -> bytes:
        """Return the error of a window."""
        return json_line({"id": failure.custom_id, "error": failure.message})

    def write(
        self, file: BinaryIO, results: Iterable[tuple[bool, bytes]], rows: "Rows | None"
    ) -> None:
        """Write the result of each text."""
        self.totals = Totals()
        windows: list[dict[str, Any]] = []
        for _, line in results:
            windows.append(json.loads(line))
            if windows[-1]["id"].startswith(_LAST):
                result = _joined(windows)
                self.totals.add(result)
                file.write(json_line(result) + b"\n")
                windows = []


def _joined(windows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the result of a text from those of its windows."""
    key = windows[0]["id"][1:]
    error = next((each["error"] for each in windows if "error" in each), None)
    if error is not None:
        return {"id": key, "error": error}
    tokens = sum(each["tokens"] for each in windows)
    logprob = math.fsum(each["logprob"] for each in windows)
    return {
        "id": key,
        "tokens": tokens,
        "logprob": logprob,
        "perplexity": perplexity(logprob, tokens),
        "is_greedy": all(each["is_greedy"] for each in windows),
    }


def perplexity(logprob: float, tokens: int) -> float | None:
    """Return the perplexity of tokens with this log-likelihood; None if it is not a number."""
    if not tokens or -logprob / tokens > 700:
        return None
    return math.exp(-logprob / tokens)


class ScoreTexts(InputFormat):
    """JSONL with texts or pairs of a prompt and a completion; any other file is one text.

    A record is a window, as JSON: the id, the token ids and the first of them that is scored, or an
    error.
    """

    name, suffix = "texts to score", ""
    has_ids, has_messages, only_scores = False, False, True
    defaults: ClassVar[FormatValues] = {}

    def __init__(self, tokenizer: Tokenizer, length: int, output: ScoreResults) -> None:
        """length: the most tokens of a window."""
        self._tokenizer, self._length = tokenizer, length
        self.output = output  # type: ignore[misc]

    def recognises(self, start: bytes) -> bool:
        """Return False: it is always chosen by the mode."""
        return False

    def is_request(self, number: int, data: bytes | None) -> bool:
        """Return True: each record is a window."""
        return True

    def records(self, file: BinaryIO, name: str) -> Iterator[bytes | None]:
        """Yield the windows of all texts of a file. Raises GetpError."""
        for text in _read_texts(file, name, self._tokenizer):
            if text.error is not None:
                yield json_line({"id": _LAST + text.key, "error": text.error})
                continue
            # A text without a token to score has one window, so that it has a result.
            parts = list(windows(len(text.ids), text.first, self._length)) or [(0, 1, 1)]
            for start, end, first in parts:
                key = (_LAST if end >= len(text.ids) else _OTHER) + text.key
                ids = text.ids[start:end] or [0]
                yield json_line({"id": key, "ids": ids, "first": first - start})

    def identify(self, line: Line) -> tuple[str, dict[str, Any]]:
        """Return the id of a window, and the window."""
        window: dict[str, Any] = json.loads(line.data or b"")
        return window["id"], window

    def parse(self, line: Line, record: dict[str, Any]) -> ParsedBody:
        """Return the request of a window. Raises BadRequestError."""
        if "error" in record:
            raise BadRequestError("invalid_text", record["error"])
        params = {
            "max_new_tokens": 0,
            "prompt_logprobs": 1,
            "prompt_logprobs_from": record["first"],
        }
        return ParsedBody(prompt=record["ids"], params=params)


def windows(tokens: int, first: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield windows [start, end) of at most `length` tokens, and the first that each scores.

    Together they score the tokens from `first` on, each once.
    """
    at = first
    while at < tokens:
        end = min(tokens, max(length, at + max(length // 2, 1)))
        yield max(0, end - length), end, at
        at = end


@dataclass(frozen=True)
class _Text:
    """A text to score: its token ids from position `first` on."""

    key: str
    ids: list[int] = field(default_factory=list)
    first: int = 1
    error: str | None = None


def _read_texts(file: BinaryIO, name: str, tokenizer: Tokenizer) -> Iterator[_Text]:
    """Yield the texts of a file: those of JSONL, or the whole file as one text."""
    if name.endswith(_JSONL):
        for index, line in enumerate(iter_lines(file)):
            if line is None or line.strip():
                yield _read_line(line, index, tokenizer)
        return
    try:
        text = file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise GetpError(f"{name} is neither JSONL nor a text in UTF-8: {error}") from error
    yield _Text("0", tokenizer.encode(text))


def _read_line(line: bytes | None, index: int, tokenizer: Tokenizer) -> _Text:
    key = f"request-{index}"
    try:
        record = _parsed(line)
        if not isinstance(record, dict):
            raise ValueError("it is not a JSON object, or too long")
        key = str(record.get("id", record.get("custom_id", key)))
        return _encoded(key, record, tokenizer)
    except (ValueError, TokenizerError) as error:
        return _Text(key, error=f"line {index + 1}: {error}")


def _parsed(line: bytes | None) -> Any:
    try:
        return json.loads(line or b"null")
    except (ValueError, RecursionError) as error:
        cause = error
        if isinstance(error, json.JSONDecodeError):  # its line number is that within this line
            cause = ValueError(f"{error.msg} at column {error.colno}")
        raise ValueError(f"it is not valid JSON: {cause}") from error


def _encoded(key: str, record: dict[str, Any], tokenizer: Tokenizer) -> _Text:
    """Encode a text, or a prompt with its completion. Raises ValueError, TokenizerError."""
    found = {name: record[name] for name in ("text", "prompt", "completion") if name in record}
    if set(found) not in ({"text"}, {"prompt", "completion"}) or not all(
        isinstance(value, str) for value in found.values()
    ):
        raise ValueError("it needs a 'text', or a 'prompt' and a 'completion', which are strings")
    if "text" in found:
        return _Text(key, tokenizer.encode(found["text"]))
    # A token may span the end of the prompt; it then belongs to the completion.
    context = tokenizer.encode(found["prompt"])
    ids = tokenizer.encode(found["prompt"] + found["completion"])
    common = zip(context, ids, strict=False)
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], common))
    return _Text(key, ids, max(length, 1))
