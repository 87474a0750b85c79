"""Converts a line of the input to a request for the engine, or to a failure with its reason."""

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from engine import SamplingParams
from getp.defaults import NO_LIMIT, Defaults
from getp.errors import GetpError, NameOf, worded
from getp.job.formats.interface import Failure, JobRequest, Line
from getp.job.inputs import Source
from getp.openai.parsed import BadRequestError, ParsedBody
from getp.openai.tools import check_template
from getp.terminal import warn
from getp.text.answer_text import PLAIN, AnswerOptions
from getp.text.grammars import after_thinking
from getp.text.parts.thinking import thinking_budget
from getp.text.parts.tool_calls import format_of
from getp.text.prompts import (
    bad_word_ids,
    chat_template,
    check_length,
    request_seed,
    system_message,
    template_messages,
    template_variables,
)
from getp.text.truncate import Side, Truncation
from tokenizer import ChatTemplate, Message, TemplateError, Tokenizer, TokenizerError
from tokenizer.harmony import supports_harmony


@dataclass(frozen=True)
class RequestDefaults(Defaults):
    """What holds for requests that do not set their own.

    The seed in `params` is the job's; each request derives its own from it.
    """

    answer: AnswerOptions = PLAIN
    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the chat template
    thinking_budget: int | None = None  # tokens
    truncate: Side = "none"  # where prompts that are too long are cut


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
        self._notice, self._noticed = notice, set[str]()
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
        by_template = _is_by_template(body, chat)
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
        if body.offered_tools:
            changes["tools"] = body.offered_tools
        prompt_ids, is_cut = self._prompt(body, chat, params)
        params = self._with_budget(params, body, prompt_ids)
        if chat:
            params = after_thinking(params, self._tokenizer, prompt_ids)
        return JobRequest(
            line.index,
            line.number,
            custom_id,
            prompt_ids,
            params,
            replace(self.defaults.answer, **changes),
            body.n,
            body.best_of or body.n,
            self.defaults.truncate if is_cut else "none",
        )

    def _with_budget(
        self, params: SamplingParams, body: ParsedBody, prompt_ids: list[int]
    ) -> SamplingParams:
        """Return the parameters with the request's budget of thinking tokens, or the job's."""
        own, default = body.thinking_budget, self.defaults.thinking_budget
        tokens = default if own is None else own
        if tokens in (None, -1) or self._tokenizer is None:
            return params
        budget = thinking_budget(self._tokenizer, prompt_ids, tokens)
        if budget is None and own is not None:
            raise BadRequestError(
                "unsupported_parameter",
                "'thinking_token_budget' needs a model whose chat template marks its thinking, "
                "such as <think>",
            )
        return replace(params, thinking=budget)

    def _prompt(
        self, body: ParsedBody, chat: bool, params: SamplingParams
    ) -> tuple[list[int], bool]:
        """Return the prompt's token ids, and whether it was cut. Raises BadRequestError."""
        limit = min(self._max_positions, params.max_positions or NO_LIMIT)
        side = self.defaults.truncate
        if side == "none" or limit == NO_LIMIT or self._tokenizer is None or body.prompt == "":
            return self.encode(body, chat, params.max_positions), False
        cut = Truncation(side, self._tokenizer, limit, params.max_new_tokens)
        try:
            if isinstance(body.prompt, list):
                return cut.ids(body.prompt)
            if not _is_by_template(body, chat):
                return cut.text(str(body.prompt))
            return cut.conversation(
                self._messages(body), lambda messages: self._rendered(body, messages)
            )
        except TokenizerError as error:
            raise BadRequestError("not_encodable", str(error)) from error
        except GetpError as error:
            raise BadRequestError("prompt_too_long", worded(error, self._name_of)) from error

    def _rendered(self, body: ParsedBody, messages: Sequence[Message] | None = None) -> str:
        """Return the text of a conversation; messages: in place of the request's own."""
        try:
            return self._render(body, self._messages(body) if messages is None else messages)
        except TemplateError as error:
            raise BadRequestError("template_failed", str(error)) from error
        except GetpError as error:
            raise BadRequestError("no_chat_template", worded(error, self._name_of)) from error

    def _render(self, body: ParsedBody, messages: Sequence[Message]) -> str:
        template = chat_template(self._tokenizer)
        given = template_variables(template, {**self.defaults.variables, **body.variables})
        unused = sorted(set(given) - template.variables)
        if unused:
            self._notice_once(
                "variable",
                f"this model's chat template does not use {unused[0][:80]!r}: it is ignored, and "
                "so are other such values (this is said once)",
            )
        variables = {name: given[name] for name in given.keys() - {*unused}}
        if body.offered_tools:
            self._check_tools(template)
            variables["tools"] = body.tools
        return template.render(template_messages(template, messages), variables, self._now)

    def _check_tools(self, template: ChatTemplate) -> None:
        """Raise BadRequestError for a template without tools."""
        check_template(template)
        if format_of(template) is None and not supports_harmony(self._tokenizer):
            self._notice_once(
                "tools",
                "this model's chat template shows no known format of tool calls: they stay part of "
                "the text",
            )

    def _notice_once(self, about: str, text: str) -> None:
        if about not in self._noticed:
            self._noticed.add(about)
            self._notice(text)

    def _messages(self, body: ParsedBody) -> list[Message]:
        system = system_message(self.defaults.system)
        if body.messages is None:
            return [*system, {"role": "user", "content": body.prompt}]
        has_system = body.messages[0].get("role") in ("system", "developer")
        return body.messages if has_system else [*system, *body.messages]

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


def _is_by_template(body: ParsedBody, chat: bool) -> bool:
    return body.messages is not None or (chat and isinstance(body.prompt, str))
