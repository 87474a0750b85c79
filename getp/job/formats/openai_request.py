"""Request bodies of OpenAI's /v1/chat/completions and /v1/completions.

A request with an unsupported field that would change the result fails: ignoring the field would
give a wrong answer.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from getp.job.formats.interface import BadRequestError, ParsedBody
from getp.job.formats.openai_messages import read_messages

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"

_LIMIT_NAMES = ("max_tokens", "max_completion_tokens")  # the old and the current name
_MAX_STOPS, _MAX_STOP_LENGTH = 16, 1024

# Fields that do not affect the tokens. `model` is ignored because a job has only one model.
_IGNORED_FIELDS = frozenset(
    """model user metadata store service_tier safety_identifier prompt_cache_key
    prompt_cache_retention stream stream_options parallel_tool_calls request_id priority
    cache_salt""".split()
)
# Unsupported fields of OpenAI and vLLM: the values that have no effect, and the error message for
# any other value.
_NOT_SUPPORTED = "is not supported"
_ONE_SAMPLE = "must be 1 (several samples are not supported)"
_NO_TOOLS = "must be 'none' or 'auto' (tools are not supported)"
_NO_PENALTIES = "must be {} (penalties are not supported)"
_NEUTRAL_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), _ONE_SAMPLE),
    "best_of": ((1,), _ONE_SAMPLE),
    "echo": ((False,), "must be false (echo is not supported)"),
    "suffix": (("",), _NOT_SUPPORTED),
    "frequency_penalty": ((0,), _NO_PENALTIES.format(0)),
    "presence_penalty": ((0,), _NO_PENALTIES.format(0)),
    "repetition_penalty": ((1,), _NO_PENALTIES.format(1)),
    "length_penalty": ((1,), _NO_PENALTIES.format(1)),
    "min_p": ((0,), "must be 0 (min-p sampling is not supported)"),
    "typical_p": ((1,), "must be 1 (typical sampling is not supported)"),
    "min_tokens": ((0,), "must be 0 (a minimum length is not supported)"),
    "use_beam_search": ((False,), "must be false (beam search is not supported)"),
    "early_stopping": ((False,), "must be false (beam search is not supported)"),
    "bad_words": (([],), _NOT_SUPPORTED),
    "allowed_token_ids": (([],), _NOT_SUPPORTED),
    "stop_token_ids": (([],), _NOT_SUPPORTED),
    "include_stop_str_in_output": ((False,), "must be false (stop strings are always removed)"),
    "skip_special_tokens": ((True,), "must be true (special tokens are never shown)"),
    "spaces_between_special_tokens": ((True,), "must be true"),
    "detokenize": ((True,), "must be true"),
    "return_token_ids": ((False,), _NOT_SUPPORTED),
    "return_tokens_as_token_ids": ((False,), _NOT_SUPPORTED),
    "prompt_logprobs": ((False,), _NOT_SUPPORTED),
    "truncate_prompt_tokens": ((), _NOT_SUPPORTED),
    "response_format": (({"type": "text"},), "must be {'type': 'text'}"),
    "guided_json": ((), _NOT_SUPPORTED),
    "guided_regex": ((), _NOT_SUPPORTED),
    "guided_choice": ((), _NOT_SUPPORTED),
    "guided_grammar": ((), _NOT_SUPPORTED),
    "structured_outputs": ((), _NOT_SUPPORTED),
    "vllm_xargs": (({},), _NOT_SUPPORTED),
}
_NEUTRAL_IN_TEXT = {
    "add_special_tokens": ((True,), "must be true"),
}
_NEUTRAL_IN_CHAT = {
    "add_special_tokens": ((False,), "must be false (the chat template writes them)"),
    "add_generation_prompt": ((True,), "must be true"),
    "continue_final_message": ((False,), "must be false (this is not supported)"),
    "include_reasoning": ((True,), "must be true"),
    "verbosity": (("medium",), "must be 'medium'"),
    "modalities": ((["text"],), "must be ['text']"),
    "documents": (([],), _NOT_SUPPORTED),
    "tools": (([],), _NOT_SUPPORTED),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NOT_SUPPORTED),
    "function_call": (("none", "auto"), _NO_TOOLS),
}


def read_body(body: Mapping[str, Any], chat: bool) -> ParsedBody:
    """Read the body of a chat or a text completion. Raises BadRequestError."""
    parsed = ParsedBody()
    _check_prompt(body, chat)
    readers, neutral_values = _READERS[chat], _ALL_NEUTRAL[chat]
    for name, value in body.items():
        if value is None or name in _IGNORED_FIELDS:
            continue
        if name in readers:
            readers[name](parsed, name, value)
        elif name not in neutral_values:
            raise _unknown(name, chat)
        else:
            neutral, reason = neutral_values[name]
            if not any(_equals_neutral(value, each) for each in neutral):
                raise BadRequestError("unsupported_parameter", f"{name!r} {reason}")
    limits = {name: body[name] for name in _LIMIT_NAMES if body.get(name) is not None}
    if chat and len(set(limits.values())) > 1:
        raise BadRequestError(
            "invalid_value", f"{' and '.join(map(repr, limits))} differ: give only one"
        )
    if chat and body.get("logprobs") is not True and parsed.params.pop("logprobs", 0):
        raise BadRequestError("invalid_value", "'top_logprobs' needs 'logprobs': true")
    return parsed


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
    if name in _READERS[not chat] or name in _ALL_NEUTRAL[not chat]:
        kind = "prompts" if chat else "chats ('messages')"
        return BadRequestError("unsupported_parameter", f"{shown} applies only to {kind}")
    return BadRequestError("unknown_parameter", f"unknown parameter {shown}")


def _equals_neutral(value: Any, neutral: Any) -> bool:
    # In Python, True == 1.
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _invalid(name: str, wanted: str) -> BadRequestError:
    return BadRequestError("invalid_value", f"{name!r} must be {wanted}")


def _quoted(value: Any) -> str:
    """Return an invalid value for a message, shortened."""
    if isinstance(value, str):
        number = re.fullmatch(r"\s*-?[0-9.]+\s*", value)
        return f"the string {value[:40]!r}" + (": remove the quotes" if number else "")
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value)[:40]


def _read_integer(body: ParsedBody, name: str, value: Any) -> None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid(name, f"an integer, not {_quoted(value)}")
    if not -(2**63) <= value < 2**63:
        raise _invalid(name, "an integer of at most 64 bits")
    _set(body, "max_new_tokens" if name in _LIMIT_NAMES else name, value, name)


def _set(body: ParsedBody, param: str, value: Any, name: str) -> None:
    """Set a field of SamplingParams from the field `name` of the body."""
    body.params[param] = value
    body.names[param] = name


def _read_number(body: ParsedBody, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _invalid(name, f"a number, not {_quoted(value)}")
    if abs(value) > 1e9:
        raise _invalid(name, "a number from -1e9 to 1e9")
    _set(body, name, float(value), name)


def _read_seed(body: ParsedBody, name: str, value: Any) -> None:
    _read_integer(body, name, value)
    body.params["seed"] &= 2**63 - 1


def _read_top_k(body: ParsedBody, name: str, value: Any) -> None:
    _read_integer(body, name, value)
    if body.params[name] == -1:  # vLLM's value for all tokens
        body.params[name] = 0


def _read_flag(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _invalid(name, "true or false")
    _set(body, name, value, name)


def _read_logit_bias(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, dict) or any(bias != 0 for bias in value.values()):
        raise BadRequestError("unsupported_parameter", f"{name!r} {_NOT_SUPPORTED}")


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
    body.messages = read_messages(value)


def _read_chat_logprobs(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _invalid(name, "true or false")
    if value:
        body.params.setdefault("logprobs", 0)


def _read_text_logprobs(body: ParsedBody, name: str, value: Any) -> None:
    if value is not False:  # as in chats: no log-probabilities
        _read_integer(body, name, value)


def _read_top_logprobs(body: ParsedBody, name: str, value: Any) -> None:
    _read_integer(body, name, value)
    body.params["logprobs"] = body.params.pop(name)
    body.names["logprobs"] = name


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
    "top_k": _read_top_k,
    "seed": _read_seed,
    "stop": _read_stop,
    "ignore_eos": _read_flag,
    "logit_bias": _read_logit_bias,
}
_TEXT_READERS: dict[str, _FieldReader] = {"prompt": _read_prompt, "logprobs": _read_text_logprobs}
_CHAT_READERS: dict[str, _FieldReader] = {
    "messages": _read_messages,
    "max_completion_tokens": _read_integer,
    "logprobs": _read_chat_logprobs,
    "top_logprobs": _read_top_logprobs,
    "reasoning_effort": _read_reasoning_effort,
    "chat_template_kwargs": _read_variables,
}
_READERS = {True: _COMMON_READERS | _CHAT_READERS, False: _COMMON_READERS | _TEXT_READERS}
_ALL_NEUTRAL = {
    True: _NEUTRAL_VALUES | _NEUTRAL_IN_CHAT,
    False: _NEUTRAL_VALUES | _NEUTRAL_IN_TEXT,
}

FIELDS = frozenset().union(*_READERS.values(), *_ALL_NEUTRAL.values())
"""The fields of a body, as far as they are known."""
