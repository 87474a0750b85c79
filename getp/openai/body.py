"""Request bodies of OpenAI's /v1/chat/completions and /v1/completions.

A request with an unsupported field that would change the result fails: ignoring the field would
give a wrong answer.
"""

from collections.abc import Mapping
from typing import Any

from getp.openai.fields import READERS, invalid
from getp.openai.neutral import IGNORED_FIELDS, NEUTRAL, equals_neutral
from getp.openai.parsed import BadRequestError, ParsedBody
from getp.openai.tools import check_tools

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"

_LIMIT_NAMES = ("max_tokens", "max_completion_tokens")  # the old and the current name

FIELDS = frozenset().union(*READERS.values(), *NEUTRAL.values())
"""The fields of a body, as far as they are known."""


def read_body(body: Mapping[str, Any], chat: bool) -> ParsedBody:
    """Read the body of a chat or a text completion. Raises BadRequestError."""
    parsed = ParsedBody()
    _check_prompt(body, chat)
    readers, neutral_values = READERS[chat], NEUTRAL[chat]
    for name, value in body.items():
        if value is None or name in IGNORED_FIELDS:
            continue
        if name in readers:
            readers[name](parsed, name, value)
        elif name not in neutral_values:
            raise _unknown(name, chat)
        else:
            neutral, reason = neutral_values[name]
            if not any(equals_neutral(value, each) for each in neutral):
                raise BadRequestError("unsupported_parameter", f"{name!r} {reason}")
    _check_together(parsed, body, chat)
    return parsed


def _check_together(parsed: ParsedBody, body: Mapping[str, Any], chat: bool) -> None:
    """Raise BadRequestError for fields that contradict each other."""
    limits = {name: body[name] for name in _LIMIT_NAMES if body.get(name) is not None}
    if chat and len(set(limits.values())) > 1:
        raise BadRequestError(
            "invalid_value", f"{' and '.join(map(repr, limits))} differ: give only one"
        )
    if chat and body.get("logprobs") is not True and parsed.params.pop("logprobs", 0):
        raise BadRequestError("invalid_value", "'top_logprobs' needs 'logprobs': true")
    if parsed.answer.get("echo") and "logprobs" in parsed.params:
        # Also of the prompt.
        most = max(parsed.params.get("prompt_logprobs", 0), parsed.params["logprobs"])
        parsed.params["prompt_logprobs"] = most
        parsed.names.setdefault("prompt_logprobs", "logprobs")
    check_tools(parsed)
    if parsed.best_of is not None and parsed.best_of < parsed.n:
        raise invalid("best_of", f"at least 'n', which is {parsed.n}, not {parsed.best_of}")


def _check_prompt(body: Mapping[str, Any], chat: bool) -> None:
    """Raise BadRequestError unless the body has exactly the kind of prompt that it needs."""
    found = [name for name in ("messages", "prompt") if body.get(name) is not None]
    if len(found) == 2:
        raise BadRequestError(
            "invalid_value", "'messages' and 'prompt' are both given: give only one of them"
        )
    wanted, other = ("messages", "prompt") if chat else ("prompt", "messages")
    if not found:
        raise BadRequestError("missing_parameter", f"{wanted!r} is missing")
    if found == [other]:
        here, there = (CHAT_URL, TEXT_URL) if chat else (TEXT_URL, CHAT_URL)
        raise BadRequestError(
            "unknown_parameter", f"{here!r} needs {wanted!r}; {other!r} belongs to {there!r}"
        )


def _unknown(name: str, chat: bool) -> BadRequestError:
    shown = repr(name[:80])
    if name in READERS[not chat] or name in NEUTRAL[not chat]:
        kind = "prompts" if chat else "chats ('messages')"
        return BadRequestError("unsupported_parameter", f"{shown} applies only to {kind}")
    return BadRequestError("unknown_parameter", f"unknown parameter {shown}")
