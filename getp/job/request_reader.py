"""From a line of the input to what the engine is asked, or to why it cannot be asked."""

import hashlib
import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from engine import SamplingParams
from getp.errors import GetpError
from getp.job.inputs import Line, Source
from getp.job.openai_api import CHAT_URL, TEXT_URL, BadRequestError, ParsedBody, read_body
from getp.text.prompts import chat_template, check_length, request_seed, system_message
from tokenizer import TemplateError, Tokenizer, TokenizerError

_BATCH_FIELDS = frozenset({"custom_id", "method", "url", "body"})
_LONGEST_ID = 512


@dataclass(frozen=True, slots=True)
class Task:
    """A request that can be run."""

    index: int  # in the job, from 0
    line: int  # of the input, from 1
    custom_id: str
    prompt_ids: list[int]
    params: SamplingParams
    stops: tuple[str, ...] = ()
    chat: bool = False  # the prompt came from the chat template


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that came to nothing, and why."""

    index: int
    line: int
    custom_id: str | None  # None where the line does not say
    code: str
    message: str


@dataclass(frozen=True)
class Defaults:
    """What holds for a request that does not say otherwise."""

    params: SamplingParams  # the seed is the job's, from which each request gets its own
    stops: tuple[str, ...] = ()
    chat: bool = False  # put prompts into the chat template
    system: str | None = None
    capped: bool = True  # max_positions holds for requests that say how long their answer may be


class SeenIds:
    """A set of at most `most` texts, 11 to 22 bytes each, all of them taken at the start.

    A table of 64-bit hashes, open addressing: of ten million different ids, two share a hash
    with a probability of 3 in a million.
    """

    def __init__(self, most: int) -> None:
        size = 1 << (most * 4 // 3).bit_length()  # a quarter of it or more stays free
        self._table = array("Q", [0]) * size

    def add(self, text: str) -> bool:
        """Add a text; return whether it was new."""
        data = text.encode("utf-8", "surrogatepass")
        key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
        mask = len(self._table) - 1
        place = key & mask
        while self._table[place] not in (0, key):
            place = (place + 1) & mask
        new = not self._table[place]
        self._table[place] = key
        return new


class TaskReader:
    """Reads the requests of a job, one after the other."""

    def __init__(
        self,
        source: Source,
        defaults: Defaults,
        tokenizer: Tokenizer,
        moment: datetime | None = None,
        max_positions: int = 1 << 60,
    ) -> None:
        """moment: what chat templates take for now, so that a resumed job has the same prompts.

        max_positions: the model's own limit.
        """
        self._moment = moment
        self._max_positions = max_positions
        self._kind = source.kind
        self._defaults = defaults
        self._tokenizer = tokenizer
        self._seen = SeenIds(source.total if source.kind == "jsonl" else 0)

    def read(self, line: Line, needed: bool = True) -> Task | Failure | None:
        """Return the task of a line, or its failure; None if it is not `needed`.

        Lines that are done already must pass here, too: their ids may come again further down.
        """
        custom_id: str | None = None
        try:
            if self._kind == "text":
                custom_id = f"request-{line.index}"
                return self._task(line, custom_id, self._text(line), None) if needed else None
            record = _json_object(_decoded(line))
            given = record.get("custom_id", record.get("id", f"request-{line.index}"))
            custom_id = str(given) if type(given) is int else given
            if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _LONGEST_ID:
                custom_id = None
                raise BadRequestError(
                    "invalid_id", f"the id must be a text of 1 to {_LONGEST_ID} characters"
                )
            if not self._seen.add(custom_id):
                raise BadRequestError(
                    "duplicate_custom_id", f"an earlier line has the id {custom_id!r}, too"
                )
            if not needed:
                return None
            asked, chat = _batch(record) if "body" in record else _plain(record)
            return self._task(line, custom_id, asked, chat)
        except BadRequestError as error:
            return Failure(line.index, line.number, custom_id, error.code, str(error))
        except Exception as error:  # whatever one request does, the others go on
            message = f"{type(error).__name__}: {error}"
            return Failure(line.index, line.number, custom_id, "internal_error", message)

    def _text(self, line: Line) -> ParsedBody:
        return ParsedBody(prompt=_decoded(line))

    def _task(self, line: Line, custom_id: str, asked: ParsedBody, chat: bool | None) -> Task:
        """Encode what is asked. `chat` None: whether the template is used is the job's to say."""
        chat = self._defaults.chat if chat is None else chat
        params = self._params(asked, line.index)
        ids = self._encode(asked, chat, params.max_positions)
        stops = self._defaults.stops if asked.stops is None else asked.stops
        return Task(line.index, line.number, custom_id, ids, params, stops, chat)

    def _encode(self, asked: ParsedBody, chat: bool, most: int | None) -> list[int]:
        if asked.prompt == "":
            raise BadRequestError("empty_prompt", "the prompt is empty")
        by_template = asked.messages is not None or (chat and isinstance(asked.prompt, str))
        if not by_template and isinstance(asked.prompt, list):
            return asked.prompt
        text = self._rendered(asked) if by_template else str(asked.prompt)
        try:
            check_length(self._tokenizer, text, min(self._max_positions, most or 1 << 60))
        except GetpError as error:
            raise BadRequestError("prompt_too_long", str(error)) from error
        try:
            # A template has put the first token there itself.
            return self._tokenizer.encode(text, special=not by_template)
        except TokenizerError as error:
            raise BadRequestError("not_encodable", str(error)) from error

    def _rendered(self, asked: ParsedBody) -> str:
        try:
            return self._render(asked)
        except TemplateError as error:
            raise BadRequestError("template_failed", str(error)) from error
        except GetpError as error:
            raise BadRequestError("no_chat_template", str(error)) from error

    def _render(self, asked: ParsedBody) -> str:
        template = chat_template(self._tokenizer)
        unknown = sorted(set(asked.variables) - template.variables)
        if unknown:
            raise BadRequestError(
                "unsupported_parameter",
                f"the chat template knows no {', '.join(repr(name[:80]) for name in unknown)}",
            )
        system = system_message(self._defaults.system)
        if asked.messages is None:
            messages = [*system, {"role": "user", "content": asked.prompt}]
        else:
            own = asked.messages[0].get("role") in ("system", "developer")
            messages = asked.messages if own else [*system, *asked.messages]
        variables = asked.variables
        if self._moment is not None:
            variables = {"strftime_now": self._moment.strftime, **variables}
        return template.render(messages, **variables)

    def _params(self, asked: ParsedBody, index: int) -> SamplingParams:
        defaults = self._defaults.params
        changes: dict[str, Any] = {"seed": request_seed(defaults.seed, index), **asked.params}
        if "max_new_tokens" in asked.params and not self._defaults.capped:
            changes["max_positions"] = None
        if changes.get("ignore_eos"):
            changes["stop_ids"] = frozenset()
        try:
            return replace(defaults, **changes)
        except ValueError as error:
            raise BadRequestError("invalid_value", str(error)) from error


def _decoded(line: Line) -> str:
    if line.data is None:
        raise BadRequestError("line_too_long", "the line is longer than 64 MiB")
    try:
        return line.data.decode("utf-8")
    except UnicodeDecodeError:
        what = "prompt" if not line.data.lstrip().startswith(b"{") else "line"
        raise BadRequestError("invalid_utf8", f"the {what} is not valid UTF-8") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequestError("invalid_json", f"the line is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequestError("invalid_json", "the line must hold a JSON object")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _batch(record: Mapping[str, Any]) -> tuple[ParsedBody, bool]:
    """Read a line of an OpenAI batch file."""
    unknown = sorted(set(record) - _BATCH_FIELDS)
    if unknown:
        raise BadRequestError("unknown_parameter", f"unknown field {unknown[0][:80]!r}")
    if "custom_id" not in record:
        raise BadRequestError("missing_parameter", "'custom_id' is missing")
    if record.get("method", "POST") != "POST":
        raise BadRequestError("invalid_value", "'method' must be 'POST'")
    if record.get("url") not in (CHAT_URL, TEXT_URL):
        raise BadRequestError("unsupported_url", f"'url' must be {CHAT_URL!r} or {TEXT_URL!r}")
    if not isinstance(record["body"], dict):
        raise BadRequestError("invalid_value", "'body' must be an object")
    chat = record["url"] == CHAT_URL
    return read_body(record["body"], chat), chat


def _plain(record: Mapping[str, Any]) -> tuple[ParsedBody, bool | None]:
    """Read a line with a "prompt" or "messages", and parameters beside it."""
    body = {name: value for name, value in record.items() if name not in ("id", "custom_id")}
    if "messages" in body:
        return read_body(body, chat=True), True
    return read_body(body, chat=False), None
