"""Request bodies of OpenAI's /v1/chat/completions and /v1/completions.

A request with an unsupported field that would change the result fails: ignoring the field would
give a wrong answer.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from getp.job.formats.interface import BadRequestError, ParsedBody
from tokenizer import Message

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"

_LIMIT_NAMES = ("max_tokens", "max_completion_tokens")  # the old and the current name
_MAX_STOPS, _MAX_STOP_LENGTH = 16, 1024

# Fields that do not affect the tokens. `model` is ignored because a job has only one model.
_IGNORED_FIELDS = frozenset(
    """model user metadata store service_tier safety_identifier prompt_cache_key
    prompt_cache_retention stream_options parallel_tool_calls""".split()
)
# Unsupported fields: the values that have no effect, and the error message for any other value.
_NOT_SUPPORTED = "is not supported"
_ONE_SAMPLE = "must be 1 (several samples are not supported)"
_NEUTRAL_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), _ONE_SAMPLE),
    "best_of": ((1,), _ONE_SAMPLE),
    "stream": ((False,), "must be false (a job does not stream)"),
    "echo": ((False,), "must be false (echo is not supported)"),
    "suffix": (("",), _NOT_SUPPORTED),
    "frequency_penalty": ((0,), "must be 0 (penalties are not supported)"),
    "presence_penalty": ((0,), "must be 0 (penalties are not supported)"),
    "logit_bias": (({},), _NOT_SUPPORTED),
    "response_format": (({"type": "text"},), "must be {'type': 'text'}"),
    "modalities": ((["text"],), "must be ['text']"),
    "tools": (([],), _NOT_SUPPORTED),
    "tool_choice": (("none", "auto"), "must be 'none' or 'auto' (tools are not supported)"),
    "functions": (([],), _NOT_SUPPORTED),
    "function_call": (("none", "auto"), "must be 'none' or 'auto' (tools are not supported)"),
}


def read_body(body: Mapping[str, Any], chat: bool) -> ParsedBody:
    """Read the body of a chat or a text completion. Raises BadRequestError."""
    parsed = ParsedBody()
    for name, value in body.items():
        if value is None or name in _IGNORED_FIELDS:
            continue
        reader = _COMMON_READERS.get(name) or (_CHAT_READERS if chat else _TEXT_READERS).get(name)
        if reader is not None:
            reader(parsed, name, value)
        elif name not in _NEUTRAL_VALUES:
            raise BadRequestError("unknown_parameter", f"unknown parameter {name[:80]!r}")
        else:
            neutral, reason = _NEUTRAL_VALUES[name]
            if not any(_equals_neutral(value, each) for each in neutral):
                raise BadRequestError("unsupported_parameter", f"{name!r} {reason}")
    limits = {name: body[name] for name in _LIMIT_NAMES if body.get(name) is not None}
    if chat and len(set(limits.values())) > 1:
        raise BadRequestError(
            "invalid_value", f"{' and '.join(map(repr, limits))} differ: give only one"
        )
    if chat and body.get("logprobs") is not True and "logprobs" in parsed.params:
        raise BadRequestError("invalid_value", "'top_logprobs' needs 'logprobs': true")
    if (parsed.messages if chat else parsed.prompt) is None:
        name = "messages" if chat else "prompt"
        raise BadRequestError("missing_parameter", f"{name!r} is missing")
    return parsed


def _equals_neutral(value: Any, neutral: Any) -> bool:
    # In Python, True == 1.
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _invalid(name: str, wanted: str) -> BadRequestError:
    return BadRequestError("invalid_value", f"{name!r} must be {wanted}")


def _quoted(value: Any) -> str:
    """Return an invalid value for a message, shortened."""
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value)[:40]


def _read_integer(body: ParsedBody, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid(name, f"an integer, not {_quoted(value)}")
    if not -(2**63) <= value < 2**63:
        raise _invalid(name, "an integer of at most 64 bits")
    body.params["max_new_tokens" if name in _LIMIT_NAMES else name] = value


def _read_number(body: ParsedBody, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _invalid(name, f"a number, not {_quoted(value)}")
    if abs(value) > 1e9:
        raise _invalid(name, "a number from -1e9 to 1e9")
    body.params[name] = float(value)


def _read_seed(body: ParsedBody, name: str, value: Any) -> None:
    _read_integer(body, name, value)
    body.params["seed"] = value & (2**63 - 1)


def _read_flag(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _invalid(name, "true or false")
    body.params[name] = value


def _read_stop(body: ParsedBody, name: str, value: Any) -> None:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _invalid(name, "a string or a list of strings, none of them empty")
    if len(stops) > _MAX_STOPS or any(len(stop) > _MAX_STOP_LENGTH for stop in stops):
        raise _invalid(
            name, f"at most {_MAX_STOPS} strings of at most {_MAX_STOP_LENGTH} characters"
        )
    body.stops = tuple(stops)


def _read_prompt(body: ParsedBody, name: str, value: Any) -> None:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if not isinstance(value, str) and not _is_token_ids(value):
        raise _invalid(
            name, "a string or a list of token ids; put several prompts on several lines"
        )
    body.prompt = value


def _is_token_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in value)
    )


def _read_messages(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise _invalid(name, "a list of messages")
    body.messages = [_read_message(entry) for entry in value]


def _read_message(entry: Any) -> Message:
    if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
        raise _invalid("messages", "a list of objects with a 'role'")
    content = entry.get("content")
    if isinstance(content, list):
        texts = [part["text"] for part in content if _is_text(part)]
        if len(texts) < len(content):
            raise BadRequestError(
                "unsupported_content", "every part of a message must be of type 'text'"
            )
        return {**entry, "content": "".join(texts)}
    if not isinstance(content, str) and not (content is None and entry.get("tool_calls")):
        raise _invalid("messages", "objects with a string as 'content'")
    return entry


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _read_chat_logprobs(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _invalid(name, "true or false")
    if value:
        body.params.setdefault("logprobs", 0)


def _read_top_logprobs(body: ParsedBody, name: str, value: Any) -> None:
    _read_integer(body, "logprobs", value)


def _read_reasoning_effort(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _invalid(name, f"a string, not {_quoted(value)}")
    body.variables[name] = value


def _read_variables(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, dict) or "messages" in value:
        raise _invalid(name, "an object without 'messages'")
    body.variables.update(value)


_FieldReader = Callable[[ParsedBody, str, Any], None]
_COMMON_READERS: dict[str, _FieldReader] = {
    "max_tokens": _read_integer,
    "temperature": _read_number,
    "top_p": _read_number,
    "top_k": _read_integer,
    "seed": _read_seed,
    "stop": _read_stop,
    "ignore_eos": _read_flag,
}
_TEXT_READERS: dict[str, _FieldReader] = {"prompt": _read_prompt, "logprobs": _read_integer}
_CHAT_READERS: dict[str, _FieldReader] = {
    "messages": _read_messages,
    "max_completion_tokens": _read_integer,
    "logprobs": _read_chat_logprobs,
    "top_logprobs": _read_top_logprobs,
    "reasoning_effort": _read_reasoning_effort,
    "chat_template_kwargs": _read_variables,
}
