"""OpenAI's shapes: what a request body may ask for, and what a response body says.

Bodies of /v1/chat/completions and /v1/completions. A field that would change the result and is
not supported is an error of its request: an ignored one would be a wrong answer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine import Completion
from tokenizer import Message, Tokenizer

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"

_LIMITS = ("max_tokens", "max_completion_tokens")  # the older name of a chat's, and the newer
_MOST_STOPS, _LONGEST_STOP = 16, 1024
_MIN_LOGPROB = -9999.0  # OpenAI's way to write minus infinity, which JSON cannot

# Without influence on the tokens. The checkpoint answers, whatever model is named.
_HARMLESS = frozenset(
    """model user metadata store service_tier safety_identifier prompt_cache_key
    prompt_cache_retention stream_options parallel_tool_calls""".split()
)
# The values with which a field we do not support does nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
}


class BadRequestError(Exception):
    """A request that cannot be run as it asks; the others are not concerned."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class ParsedBody:
    """What a body asks for."""

    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    params: dict[str, Any] = field(default_factory=dict)  # those of SamplingParams it sets
    stops: tuple[str, ...] | None = None  # None: the job's
    variables: dict[str, Any] = field(default_factory=dict)  # for the chat template


def read_body(body: Mapping[str, Any], chat: bool) -> ParsedBody:
    """Read the body of a chat or a text completion. Raises BadRequestError."""
    asked = ParsedBody()
    for name, value in body.items():
        if value is None or name in _HARMLESS:
            continue
        reader = _COMMON.get(name) or (_CHAT if chat else _TEXT).get(name)
        if reader is not None:
            reader(asked, name, value)
        elif name not in _NEUTRAL:
            raise BadRequestError("unknown_parameter", f"unknown parameter {name[:80]!r}")
        elif not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
            raise BadRequestError(
                "unsupported_parameter",
                f"{name!r} is not supported, except as {_NEUTRAL[name][0]!r}",
            )
    limits = {name: body[name] for name in _LIMITS if body.get(name) is not None}
    if chat and len(set(limits.values())) > 1:
        raise BadRequestError(
            "invalid_value", f"{' and '.join(map(repr, limits))} differ: give one"
        )
    if chat and body.get("logprobs") is not True and "logprobs" in asked.params:
        raise BadRequestError("invalid_value", "'top_logprobs' needs 'logprobs': true")
    if (asked.messages if chat else asked.prompt) is None:
        name = "messages" if chat else "prompt"
        raise BadRequestError("missing_parameter", f"{name!r} is missing")
    return asked


def _same(value: Any, neutral: Any) -> bool:
    # In Python, True is 1.
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _wrong(name: str, wanted: str) -> BadRequestError:
    return BadRequestError("invalid_value", f"{name!r} must be {wanted}")


def _integer(asked: ParsedBody, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise _wrong(name, "an integer of at most 64 bits")
    asked.params["max_new_tokens" if name in _LIMITS else name] = value


def _number(asked: ParsedBody, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e9:
        raise _wrong(name, "a number")
    asked.params[name] = float(value)


def _seed(asked: ParsedBody, name: str, value: Any) -> None:
    _integer(asked, name, value)
    asked.params["seed"] = value & (2**63 - 1)


def _flag(asked: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _wrong(name, "true or false")
    asked.params[name] = value


def _stop(asked: ParsedBody, name: str, value: Any) -> None:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _wrong(name, "a text or a list of texts, none of them empty")
    if len(stops) > _MOST_STOPS or any(len(stop) > _LONGEST_STOP for stop in stops):
        raise _wrong(name, f"at most {_MOST_STOPS} texts of at most {_LONGEST_STOP} characters")
    asked.stops = tuple(stops)


def _prompt(asked: ParsedBody, name: str, value: Any) -> None:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if not isinstance(value, str) and not _are_ids(value):
        raise _wrong(name, "one text, or one list of token ids (several prompts: several lines)")
    asked.prompt = value


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in value)
    )


def _messages(asked: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise _wrong(name, "a list of messages")
    asked.messages = [_message(entry) for entry in value]


def _message(entry: Any) -> Message:
    if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
        raise _wrong("messages", "a list of objects with a 'role'")
    content = entry.get("content")
    if isinstance(content, list):
        texts = [part["text"] for part in content if _is_text(part)]
        if len(texts) < len(content):
            raise BadRequestError(
                "unsupported_content", "a message's parts must be of type 'text' alone"
            )
        return {**entry, "content": "".join(texts)}
    if not isinstance(content, str) and not (content is None and entry.get("tool_calls")):
        raise _wrong("messages", "objects with a text as 'content'")
    return entry


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _text_logprobs(asked: ParsedBody, name: str, value: Any) -> None:
    _integer(asked, name, value)


def _chat_logprobs(asked: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _wrong(name, "true or false")
    if value:
        asked.params.setdefault("logprobs", 0)


def _top_logprobs(asked: ParsedBody, name: str, value: Any) -> None:
    _integer(asked, "logprobs", value)


def _effort(asked: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _wrong(name, "a text")
    asked.variables[name] = value


def _variables(asked: ParsedBody, name: str, value: Any) -> None:
    if not isinstance(value, dict) or "messages" in value:
        raise _wrong(name, "an object without 'messages'")
    asked.variables.update(value)


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
_TEXT: dict[str, _Reader] = {"prompt": _prompt, "logprobs": _text_logprobs}
_CHAT: dict[str, _Reader] = {
    "messages": _messages,
    "max_completion_tokens": _integer,
    "logprobs": _chat_logprobs,
    "top_logprobs": _top_logprobs,
    "reasoning_effort": _effort,
    "chat_template_kwargs": _variables,
}


def response_body(
    key: str, created: int, model: str, chat: bool, texts: Mapping[str, str],
    completion: Completion, tokenizer: Tokenizer,
) -> dict[str, Any]:  # fmt: skip
    """Return the body of a response; `texts` are the answer's, by channel.

    Nothing in it depends on what else was in the batch, so a resumed job says the same.
    """
    prompt, output = completion.prompt_tokens, len(completion.token_ids)
    choice: dict[str, Any] = {"index": 0}
    if chat:
        message = {"role": "assistant", "content": texts.get("final", ""), "refusal": None}
        thinking = "".join(text for name, text in texts.items() if name != "final")
        if thinking:
            message["reasoning_content"] = thinking
        choice["message"] = message
    else:
        choice["text"] = "".join(texts.values())
    choice["logprobs"] = (_chat_shape if chat else _text_shape)(completion, tokenizer)
    choice["finish_reason"] = completion.finish_reason
    return {
        "id": f"chatcmpl-{key}" if chat else f"cmpl-{key}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        },
    }


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token_id], skip_special=False)
    # Part of a character has no text of its own, and so no bytes that could be told from it.
    own_bytes = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": own_bytes}


def _pairs(completion: Completion) -> Sequence[Any]:
    return list(zip(completion.token_ids, completion.logprobs or (), strict=False))


def _chat_shape(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    content = [
        {
            **_token(tokenizer, token_id, at.logprob),
            "top_logprobs": [_token(tokenizer, other, value) for other, value in at.top],
        }
        for token_id, at in _pairs(completion)
    ]
    return {"content": content, "refusal": None}


def _text_shape(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    tokens = [_token(tokenizer, token_id, at.logprob) for token_id, at in _pairs(completion)]
    offsets, offset = [], 0
    for token in tokens:
        offsets.append(offset)
        offset += len(token["token"])
    tops = [
        {
            token["token"]: token["logprob"]
            for token in (_token(tokenizer, *pair) for pair in at.top)
        }
        for _, at in _pairs(completion)
    ]
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
