"""JSONL: one JSON object per line, as in OpenAI's batch files or with the fields at the top level.

Blank lines are skipped. The result is an OpenAI batch result file.
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from getp.defaults import JSONL, OPENAI, FormatValues
from getp.errors import GetpError
from getp.files import UTF8_BOM, json_line
from getp.job.formats.interface import (
    Failure,
    InputFormat,
    JobRequest,
    Line,
    OutputFormat,
    ResultContext,
    decode_line,
)
from getp.openai.body import CHAT_URL, FIELDS, TEXT_URL, read_body
from getp.openai.parsed import BadRequestError, ParsedBody
from getp.openai.response import response_body
from getp.text.samples import Samples

_BATCH_ONLY = frozenset({"method", "url", "body"})  # fields by which such a line is recognised
_BATCH_FIELDS = _BATCH_ONLY | {"custom_id"}
_MAX_ID_LENGTH = 512


class BatchResults(OutputFormat):
    """OpenAI's batch result file. A failed request has an error in place of a response."""

    name, suffix, holds_failures = "jsonl", ".jsonl", True

    def completed(self, context: ResultContext, request: JobRequest, samples: Samples) -> bytes:
        key = context.key(request.index)
        answers = [context.answer(request, each) for each in samples.chosen]
        body = response_body(context, key, request.answer.chat, answers, samples)
        if request.truncated != "none":
            body["truncated"] = request.truncated
        response = {"status_code": 200, "request_id": f"req_{key}", "body": body}
        return _result_line(key, request.custom_id, response, None)

    def failed(self, context: ResultContext, failure: Failure) -> bytes:
        error = {"code": failure.code, "message": failure.message, "line": failure.line}
        return _result_line(context.key(failure.index), failure.custom_id, None, error)


def _result_line(key: str, custom_id: str | None, response: object, error: object) -> bytes:
    return json_line(
        {"id": f"batch_req_{key}", "custom_id": custom_id, "response": response, "error": error}
    )


BATCH_RESULTS = BatchResults()


class Jsonl(InputFormat):
    """JSONL."""

    name, suffix, output = "jsonl", ".jsonl", BATCH_RESULTS
    has_ids, has_messages, may_be_shard = True, True, True
    defaults = JSONL
    openai_defaults: ClassVar[FormatValues | None] = OPENAI

    def recognises(self, start: bytes) -> bool:
        first = start.removeprefix(UTF8_BOM).split(b"\n", 1)[0]
        return first.lstrip().startswith(b"{")

    def announced_count(self, name: str, first: bytes | None) -> None:
        if (first or b"").removeprefix(UTF8_BOM).lstrip().startswith(b"["):
            raise GetpError(
                f"{name} is a JSON array; write each request on a line of its own, without the "
                "array's brackets and commas"
            )

    def is_request(self, number: int, data: bytes | None) -> bool:
        return data is None or bool(data.strip())

    def identify(self, line: Line) -> tuple[str, dict[str, Any]]:
        record = _json_object(decode_line(line, "line"))
        custom_id = record.get("custom_id", record.get("id", f"request-{line.index}"))
        if type(custom_id) is int:
            custom_id = str(custom_id)
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID_LENGTH:
            raise BadRequestError(
                "invalid_id", f"the id must be a string of 1 to {_MAX_ID_LENGTH} characters"
            )
        return custom_id, record

    def parse(self, line: Line, record: dict[str, Any]) -> ParsedBody:
        batch = not _BATCH_ONLY.isdisjoint(record)
        return _parse_batch(record) if batch else parse_flat(record)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        cause: object = error
        if isinstance(error, json.JSONDecodeError):
            cause = f"{error.msg} at column {error.colno}"  # its line is always 1
        raise BadRequestError("invalid_json", f"the line is not valid JSON: {cause}") from error
    if not isinstance(value, dict):
        raise BadRequestError("invalid_json", "the line must be a JSON object")
    return value


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _parse_batch(record: Mapping[str, Any]) -> ParsedBody:
    """Read a line of an OpenAI batch file."""
    for name in ("custom_id", "url", "body"):
        if record.get(name) is None:
            raise BadRequestError(
                "missing_parameter",
                f"{name!r} is missing: a line of an OpenAI batch file has 'custom_id', 'method', "
                "'url' and 'body', and the prompt and its parameters are in 'body'",
            )
    unknown = sorted(set(record) - _BATCH_FIELDS)
    if unknown:
        shown = repr(unknown[0][:80])
        if unknown[0] in FIELDS:
            raise BadRequestError("invalid_value", f"{shown} is beside 'body': put it into 'body'")
        raise BadRequestError("unknown_parameter", f"unknown field {shown}")
    if record.get("method", "POST") != "POST":
        raise BadRequestError("invalid_value", "'method' must be 'POST'")
    if record["url"] not in (CHAT_URL, TEXT_URL):
        raise BadRequestError("unsupported_url", f"'url' must be {CHAT_URL!r} or {TEXT_URL!r}")
    if not isinstance(record["body"], dict):
        raise BadRequestError("invalid_value", "'body' must be an object")
    chat: bool = record["url"] == CHAT_URL
    parsed = read_body(record["body"], chat)
    parsed.chat, parsed.openai = chat, True
    return parsed


def parse_flat(record: Mapping[str, Any]) -> ParsedBody:
    """Read a line with a "prompt" or "messages", and parameters beside it."""
    body = {name: value for name, value in record.items() if name not in ("id", "custom_id")}
    if body.get("messages") is None and body.get("prompt") is None:
        raise BadRequestError("missing_parameter", "'prompt' or 'messages' is missing")
    chat = body.get("messages") is not None
    parsed = read_body(body, chat)
    parsed.chat = chat or None
    return parsed


FORMAT = Jsonl()
