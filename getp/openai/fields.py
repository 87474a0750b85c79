"""Reads the fields of request bodies, each by a function that checks its value."""

import json
import re
from collections.abc import Callable
from typing import Any

from getp.openai.grammars import read_guided, read_response_format, read_structured_outputs
from getp.openai.messages import read_messages
from getp.openai.parsed import BadRequestError, ParsedBody
from getp.openai.tools import read_parallel_calls, read_tool_choice, read_tools

_MAX_STOPS, _MAX_STOP_LENGTH = 16, 1024
_MAX_SAMPLES = 128  # of a prompt, as OpenAI's limit for n
_MAX_TOKEN_IDS = 1024
_PARAMS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
}  # fields with another name in SamplingParams


def invalid(name: str, wanted: str) -> BadRequestError:
    """Return the error of a field whose value is not what it must be."""
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
        raise invalid(name, f"an integer, not {_quoted(value)}")
    if not -(2**63) <= value < 2**63:
        raise invalid(name, "an integer of at most 64 bits")
    _set(body, _PARAMS.get(name, name), value, name)


def _set(body: ParsedBody, param: str, value: Any, name: str) -> None:
    """Set a field of SamplingParams from the field `name` of the body."""
    body.params[param] = value
    body.names[param] = name


def _read_number(body: ParsedBody, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid(name, f"a number, not {_quoted(value)}")
    if abs(value) > 1e9:
        raise invalid(name, "a number from -1e9 to 1e9")
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
        raise invalid(name, "true or false")
    _set(body, name, value, name)


def _read_logit_bias(body: ParsedBody, name: str, value: Any) -> None:
    wanted = "an object whose names are token ids and whose values are numbers"
    if not isinstance(value, dict):
        raise invalid(name, wanted)
    found = {}
    for token, bias in value.items():
        is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not re.fullmatch(r"[0-9]{1,9}", token) or not is_number:
            raise invalid(name, f"{wanted}, not {token[:40]!r}: {_quoted(bias)}")
        found[int(token)] = float(bias)
    _set(body, name, found, name)


def _read_token_ids(body: ParsedBody, name: str, value: Any) -> None:
    if value != [] and not _is_token_ids(value):
        raise invalid(name, "a list of token ids")
    if len(value) > _MAX_TOKEN_IDS:
        raise invalid(name, f"a list of at most {_MAX_TOKEN_IDS} token ids")
    _set(body, "stop_ids", frozenset(value), name)


def _read_bad_words(body: ParsedBody, name: str, value: Any) -> None:
    body.bad_words = _texts(name, value)


def _read_samples(body: ParsedBody, name: str, value: Any) -> None:
    _read_integer(body, name, value)
    count = body.params.pop(name)
    if not 1 <= count <= _MAX_SAMPLES:
        raise invalid(name, f"from 1 to {_MAX_SAMPLES}, not {count}")
    setattr(body, name, count)


def _read_answer_flag(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise invalid(name, f"true or false, not {_quoted(value)}")
    body.answer[_ANSWER_OPTIONS[name]] = value


_ANSWER_OPTIONS = {
    "include_stop_str_in_output": "include_stop",
    "skip_special_tokens": "skip_special",
    "echo": "echo",
}


def _read_stop(body: ParsedBody, name: str, value: Any) -> None:
    stops = _texts(name, [value] if isinstance(value, str) else value, "a string or ")
    if len(stops) > _MAX_STOPS or any(len(stop) > _MAX_STOP_LENGTH for stop in stops):
        raise invalid(
            name, f"at most {_MAX_STOPS} strings of at most {_MAX_STOP_LENGTH} characters"
        )
    body.stops = stops


def _texts(name: str, value: Any, before: str = "") -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise invalid(name, f"{before}a list of strings, none of them empty")
    return tuple(value)


def _read_prompt(body: ParsedBody, name: str, value: Any) -> None:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if not isinstance(value, str) and not _is_token_ids(value):
        raise invalid(name, "a string or a list of token ids; put several prompts on several lines")
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
        raise invalid(name, "true or false")
    if value:
        body.params.setdefault("logprobs", 0)


def _read_text_logprobs(body: ParsedBody, name: str, value: Any) -> None:
    if value is not False:  # as in chats: no log-probabilities
        _read_integer(body, name, value)


def _read_prompt_logprobs(body: ParsedBody, name: str, value: Any) -> None:
    if value is not False:
        _read_integer(body, name, value)
        body.answer["with_prompt_logprobs"] = True


def _read_top_logprobs(body: ParsedBody, name: str, value: Any) -> None:
    _read_integer(body, name, value)
    body.params["logprobs"] = body.params.pop(name)
    body.names["logprobs"] = name


def _read_reasoning_effort(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise invalid(name, f"a string, not {_quoted(value)}")
    body.variables[name] = value


def _read_thinking_budget(body: ParsedBody, name: str, value: Any) -> None:
    _read_integer(body, name, value)
    budget = body.params.pop(name)
    if budget < -1:
        raise invalid(name, f"0 or more, or -1 for no limit, not {budget}")
    body.thinking_budget = budget


def _read_variables(body: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, dict) or "messages" in value:
        raise invalid(name, "an object without 'messages'")
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
    "n": _read_samples,
    "best_of": _read_samples,
    "presence_penalty": _read_number,
    "frequency_penalty": _read_number,
    "repetition_penalty": _read_number,
    "min_p": _read_number,
    "min_tokens": _read_integer,
    "bad_words": _read_bad_words,
    "stop_token_ids": _read_token_ids,
    "include_stop_str_in_output": _read_answer_flag,
    "skip_special_tokens": _read_answer_flag,
    "prompt_logprobs": _read_prompt_logprobs,
    "response_format": read_response_format,
    "guided_json": read_guided,
    "guided_regex": read_guided,
    "guided_choice": read_guided,
    "guided_grammar": read_guided,
    "structured_outputs": read_structured_outputs,
    "thinking_token_budget": _read_thinking_budget,
}
_TEXT_READERS: dict[str, _FieldReader] = {
    "prompt": _read_prompt,
    "logprobs": _read_text_logprobs,
    "echo": _read_answer_flag,
}
_CHAT_READERS: dict[str, _FieldReader] = {
    "messages": _read_messages,
    "max_completion_tokens": _read_integer,
    "logprobs": _read_chat_logprobs,
    "top_logprobs": _read_top_logprobs,
    "reasoning_effort": _read_reasoning_effort,
    "chat_template_kwargs": _read_variables,
    "tools": read_tools,
    "tool_choice": read_tool_choice,
    "parallel_tool_calls": read_parallel_calls,
}
READERS = {True: _COMMON_READERS | _CHAT_READERS, False: _COMMON_READERS | _TEXT_READERS}
"""For chats (True) and texts: field → its reader, which raises BadRequestError."""
