"""Request bodies of OpenAI's /v1/chat/completions and /v1/completions.

An unsupported field that would change the result fails its request: to ignore it would give a
wrong answer.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from getp.job.formats.interface import BadRequestError, ParsedBody
from tokenizer import Message

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"

_LIMITS = ("max_tokens", "max_completion_tokens")  # the former and the present name
_MOST_STOPS, _LONGEST_STOP = 16, 1024

# Fields without influence on the tokens. The model's name is one: there is only one model.
_HARMLESS = frozenset(
    """model user metadata store service_tier safety_identifier prompt_cache_key
    prompt_cache_retention stream_options parallel_tool_calls""".split()
)
# Unsupported fields: the values with which they change nothing, and why any other is refused.
_NOT_SUPPORTED = "is not supported"
_ONE_SAMPLE = "must be 1 (several samples are not supported)"
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
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
        if value is None or name in _HARMLESS:
            continue
        reader = _COMMON.get(name) or (_CHAT if chat else _TEXT).get(name)
        if reader is not None:
            reader(parsed, name, value)
        elif name not in _NEUTRAL:
            raise BadRequestError("unknown_parameter", f"unknown parameter {name[:80]!r}")
        else:
            neutral, reason = _NEUTRAL[name]
            if not any(_same(value, each) for each in neutral):
                raise BadRequestError("unsupported_parameter", f"{name!r} {reason}")
    limits = {name: body[name] for name in _LIMITS if body.get(name) is not None}
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


def _same(value: Any, neutral: Any) -> bool:
    # In Python, True is 1.
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _wrong(name: str, wanted: str) -> BadRequestError:
    return BadRequestError("invalid_value", f"{name!r} must be {wanted}")


def _shown(value: Any) -> str:
    """Return a wrong value for a message, shortened."""
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value)[:40]


def _integer(body: ParsedBody, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, f"an integer, not {_shown(value)}")
    if not -(2**63) <= value < 2**63:
        raise _wrong(name, "an integer of at most 64 bits")
    body.params["max_new_tokens" if name in _LIMITS else name] = value


def _number(body: ParsedBody, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(name, f"a number, not {_shown(value)}")
    if abs(value) > 1e9:
        raise _wrong(name, "a number from -1e9 to 1e9")
    body.params[name] = float(value)


def _seed(body: ParsedBody, name: str, value: Any) -> None:
    _integer(body, name, value)
    body.params["seed"] = value & (2**63 - 1)


def _flag(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _wrong(name, "true or false")
    body.params[name] = value


def _stop(body: ParsedBody, name: str, value: Any) -> None:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _wrong(name, "a string or a list of strings, none of them empty")
    if len(stops) > _MOST_STOPS or any(len(stop) > _LONGEST_STOP for stop in stops):
        raise _wrong(name, f"at most {_MOST_STOPS} strings of at most {_LONGEST_STOP} characters")
    body.stops = tuple(stops)


def _prompt(body: ParsedBody, name: str, value: Any) -> None:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if not isinstance(value, str) and not _are_ids(value):
        raise _wrong(name, "a string or a list of token ids; put several prompts on several lines")
    body.prompt = value


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in value)
    )


def _messages(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise _wrong(name, "a list of messages")
    body.messages = [_message(entry) for entry in value]


def _message(entry: Any) -> Message:
    if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
        raise _wrong("messages", "a list of objects with a 'role'")
    content = entry.get("content")
    if isinstance(content, list):
        texts = [part["text"] for part in content if _is_text(part)]
        if len(texts) < len(content):
            raise BadRequestError(
                "unsupported_content", "every part of a message must be of type 'text'"
            )
        return {**entry, "content": "".join(texts)}
    if not isinstance(content, str) and not (content is None and entry.get("tool_calls")):
        raise _wrong("messages", "objects with a string as 'content'")
    return entry


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _chat_logprobs(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _wrong(name, "true or false")
    if value:
        body.params.setdefault("logprobs", 0)


def _top_logprobs(body: ParsedBody, name: str, value: Any) -> None:
    _integer(body, "logprobs", value)


def _effort(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _wrong(name, f"a string, not {_shown(value)}")
    body.variables[name] = value


def _variables(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, dict) or "messages" in value:
        raise _wrong(name, "an object without 'messages'")
    body.variables.update(value)


_Reader = Callable[[ParsedBody, str, Any], None]
_COMMON: dict[str, _Reader] = {
    "max_tokens": _integer,
    "temperature": _number,
    "top_p": _number,
    "top_k": _integer,
    "seed": _seed,
    "stop": _stop,
    "ignore_eos": _flag,
}
_TEXT: dict[str, _Reader] = {"prompt": _prompt, "logprobs": _integer}
_CHAT: dict[str, _Reader] = {
    "messages": _messages,
    "max_completion_tokens": _integer,
    "logprobs": _chat_logprobs,
    "top_logprobs": _top_logprobs,
    "reasoning_effort": _effort,
    "chat_template_kwargs": _variables,
}
