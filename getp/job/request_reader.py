"""Converts a line of the input to a request for the engine, or to a failure with its reason."""

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from engine import SamplingParams
from getp.defaults import NO_LIMIT, Defaults
from getp.errors import GetpError, NameOf, worded
from getp.job.formats.interface import Failure, JobRequest, Line
from getp.job.inputs import Source
from getp.openai.parsed import BadRequestError, ParsedBody
from getp.terminal import warn
from getp.text.answer_text import PLAIN, AnswerOptions
from getp.text.prompts import (
    bad_word_ids,
    chat_template,
    check_length,
    request_seed,
    system_message,
    template_messages,
)
from tokenizer import TemplateError, Tokenizer, TokenizerError


@dataclass(frozen=True)
class RequestDefaults(Defaults):
    """What holds for requests that do not set their own.

    The seed in `params` is the job's; each request derives its own from it.
    """

    answer: AnswerOptions = PLAIN
    system: str | None = None


class SeenIds:
    """A set of at most `capacity` strings, 11 to 22 bytes each, allocated at the start.

    A table of 64-bit hashes with open addressing: two of ten million different ids have the same
    hash with a probability of 3 in a million.
    """

    def __init__(self, capacity: int) -> None:
        size = 1 << (capacity * 4 // 3).bit_length()  # at least a quarter stays free
        self._table = array("Q", [0]) * size

    def add(self, text: str) -> bool:
        """Add a string; return whether it was new."""
        data = text.encode("utf-8", "surrogatepass")
        key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
        mask = len(self._table) - 1
        slot = key & mask
        while self._table[slot] not in (0, key):
            slot = (slot + 1) & mask
        new = not self._table[slot]
        self._table[slot] = key
        return new


class RequestReader:
    """Reads the requests of a job, one after the other."""

    def __init__(
        self,
        source: Source,
        defaults: RequestDefaults,
        tokenizer: Tokenizer,
        now: datetime | None = None,
        max_positions: int = NO_LIMIT,
        name_of: NameOf = str,
        notice: Callable[[str], None] = warn,
    ) -> None:
        """now: the time for chat templates, so that a resumed job has the same prompts.

        max_positions: the model's limit. name_of: how messages name settings. notice: is called
        with a warning that concerns many requests, once.
        """
        self._notice, self._noticed_unused = notice, False
        self._now = now
        self._max_positions = max_positions
        self._format = source.format
        self.defaults = defaults
        self._other_params = defaults.fill(source.format.defaults)
        self._openai_params = defaults.fill(source.format.openai_defaults or {})
        self._tokenizer = tokenizer
        self._name_of = name_of
        self._seen = SeenIds(source.total if source.format.has_ids else 0)

    def read(self, line: Line, needed: bool = True) -> JobRequest | Failure | None:
        """Return the request of a line, or its failure; None if it is not `needed`.

        Lines of finished requests must be read too, because a later line may repeat their ids.
        """
        custom_id: str | None = None
        try:
            if not needed and not self._format.has_ids:
                return None
            custom_id, record = self._format.identify(line)
            if self._format.has_ids and not self._seen.add(custom_id):
                raise BadRequestError("duplicate_custom_id", f"duplicate custom_id {custom_id!r}")
            if not needed:
                return None
            return self.request(line, custom_id, self._format.parse(line, record))
        except BadRequestError as error:
            return Failure(line.index, line.number, custom_id, error.code, str(error))
        except Exception as error:  # a single request must never end the job
            message = f"{type(error).__name__}: {error}"
            return Failure(line.index, line.number, custom_id, "internal_error", message)

    def encode(self, body: ParsedBody, chat: bool, limit: int | None) -> list[int]:
        """Return the prompt's token ids. Raises BadRequestError.

        limit: the request's max_positions.
        """
        if body.prompt == "":
            raise BadRequestError("empty_prompt", "the prompt is empty")
        by_template = body.messages is not None or (chat and isinstance(body.prompt, str))
        if not by_template and isinstance(body.prompt, list):
            return body.prompt
        text = self._rendered(body) if by_template else str(body.prompt)
        try:
            check_length(self._tokenizer, text, min(self._max_positions, limit or NO_LIMIT))
        except GetpError as error:
            message = worded(error, self._name_of)
            raise BadRequestError("prompt_too_long", message) from error
        try:
            # A template writes the first special token itself.
            return self._tokenizer.encode(text, special=not by_template)
        except TokenizerError as error:
            raise BadRequestError("not_encodable", str(error)) from error

    def request(self, line: Line, custom_id: str, body: ParsedBody) -> JobRequest:
        """Return the request of a body. Raises BadRequestError."""
        chat = self.defaults.answer.chat if body.chat is None else body.chat
        params = self._params(body, line.index)
        changes = {"chat": chat, "min_tokens": params.min_new_tokens, **body.answer}
        if body.stops is not None:
            changes["stops"] = body.stops
        return JobRequest(
            line.index,
            line.number,
            custom_id,
            self.encode(body, chat, params.max_positions),
            params,
            replace(self.defaults.answer, **changes),
            body.n,
            body.best_of or body.n,
        )

    def _rendered(self, body: ParsedBody) -> str:
        try:
            return self._render(body)
        except TemplateError as error:
            raise BadRequestError("template_failed", str(error)) from error
        except GetpError as error:
            raise BadRequestError("no_chat_template", worded(error, self._name_of)) from error

    def _render(self, body: ParsedBody) -> str:
        template = chat_template(self._tokenizer)
        unused = sorted(set(body.variables) - template.variables)
        if unused and not self._noticed_unused:
            self._noticed_unused = True
            self._notice(
                f"this model's chat template does not use {unused[0][:80]!r}: it is ignored, and "
                "so are other such values (this is said once)"
            )
        system = system_message(self.defaults.system)
        if body.messages is None:
            messages = [*system, {"role": "user", "content": body.prompt}]
        else:
            has_system = body.messages[0].get("role") in ("system", "developer")
            messages = body.messages if has_system else [*system, *body.messages]
        variables = {name: body.variables[name] for name in body.variables.keys() - {*unused}}
        return template.render(template_messages(template, messages), variables, self._now)

    def _params(self, body: ParsedBody, index: int) -> SamplingParams:
        defaults = self._openai_params if body.openai else self._other_params
        changes: dict[str, Any] = {"seed": request_seed(defaults.seed, index), **body.params}
        own_stops: frozenset[int] = changes.get("stop_ids", frozenset())
        if changes.get("ignore_eos"):
            changes["stop_ids"] = own_stops
        elif own_stops:
            changes["stop_ids"] = own_stops | defaults.stop_ids
        if body.bad_words is not None and self._tokenizer is not None:
            changes["bad_words"] = bad_word_ids(self._tokenizer, body.bad_words)
        try:
            return replace(defaults, **changes)
        except ValueError as error:
            message = worded(error, lambda name: repr(body.names.get(name, name)))
            raise BadRequestError("invalid_value", message) from error
