"""What models write to call tools, in the formats of their families.

Each reader takes the text between the markers of a call and returns the calls, or None if it is not
such a text. Arguments become JSON text, as in OpenAI's responses.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Schemas = Mapping[str, Any]
"""For each tool of a request, the JSON schema of its parameters."""


@dataclass
class ToolCall:
    """A call of a tool."""

    recipient: str  # the tool's name; of gpt-oss `functions.NAME`
    arguments: str = ""  # JSON text
    id: str = ""  # that of the model, if it writes one


_Reader = Callable[[str, Schemas], list[ToolCall] | None]

_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(
    r"\s*<parameter=([^>]+)>(.*?)</parameter>(?=\s*(?:<parameter=|$))", re.DOTALL
)
_INVOKE = re.compile(r'\s*<invoke name="([^"]+)">(.*?)</invoke>\s*', re.DOTALL)
_INVOKE_PARAMETER = re.compile(
    r'\s*<parameter name="([^"]+)">(.*?)</parameter>(?=\s*(?:<parameter |$))', re.DOTALL
)
_ARG = re.compile(
    r"\s*<arg_key>([^<]*)</arg_key>\s*<arg_value>(.*?)</arg_value>(?=\s*(?:<arg_key>|$))", re.DOTALL
)
_NAME = re.compile(r"([\w.\-]+)\s*(?:\[CALL_ID\]([\w\-]+))?(?:\[ARGS\])?")
_BARE_KEY = re.compile(r"([{,]\s*)([^\s{}\[\]:,\"]+)\s*:")
_DEEPSEEK = re.compile(
    r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>(?P<old>[^\n]+)\n```json\n(?P<code>.*?)\n```\s*"
    r"|(?P<name>[^<]*)<｜tool▁sep｜>(?P<plain>.*?))<｜tool▁call▁end｜>\s*",
    re.DOTALL,
)
_KIMI = re.compile(
    r"\s*<\|tool_call_begin\|>(?P<id>[^<]*)<\|tool_call_argument_begin\|>"
    r"(?P<arguments>.*?)<\|tool_call_end\|>\s*",
    re.DOTALL,
)


def read_tagged(body: str, schemas: Schemas) -> list[ToolCall] | None:
    """Read JSON (Hermes, Qwen), <function=…> (Qwen3-Coder), <invoke …> (MiniMax) or GLM's keys."""
    start = body.lstrip()[:9]
    if start[:1] in ("{", "["):
        return read_json(body, schemas)
    if start == "<function":
        return _read_elements(_FUNCTION, _PARAMETER, body, schemas)
    if start[:7] == "<invoke":
        return _read_elements(_INVOKE, _INVOKE_PARAMETER, body, schemas)
    name, key, rest = body.partition("<arg_key>")
    if not re.fullmatch(r"[\w.\-]+", name.strip()):
        return None
    found = _parameters(_ARG, key + rest, schemas.get(name.strip()))
    return None if found is None else [ToolCall(name.strip(), _json_text(found))]


def read_json(body: str, schemas: Schemas) -> list[ToolCall] | None:
    """Read JSON objects with a name and arguments (or parameters), or lists of them."""
    calls = []
    try:
        for value in _json_values(body, ";,"):
            for each in value if isinstance(value, list) else [value]:
                calls.append(_call_of(each))
    except (ValueError, RecursionError):
        return None
    return calls or None


def read_known(body: str, schemas: Schemas) -> list[ToolCall] | None:
    """Read JSON that calls tools of the request (Llama 3): other JSON is an answer."""
    calls = read_json(body, schemas)
    known = calls is not None and all(call.recipient in schemas for call in calls)
    return calls if known else None


def read_mistral(body: str, schemas: Schemas) -> list[ToolCall] | None:
    """Read a JSON list, or NAME[ARGS]{…}, also several of them."""
    rest = body.strip()
    if rest[:1] == "[" and not rest.startswith("[TOOL_CALLS]"):
        return read_json(body, schemas)
    calls = []
    while rest:
        name = _NAME.match(rest := rest.removeprefix("[TOOL_CALLS]").lstrip())
        if name is None:
            return None
        try:
            rest = rest[name.end() :].lstrip()
            arguments, end = _DECODER.raw_decode(rest)
            calls.append(ToolCall(name[1], _arguments(arguments), name[2] or ""))
        except (ValueError, RecursionError):
            return None
        rest = rest[end:].lstrip()
    return calls or None


def read_deepseek(body: str, schemas: Schemas) -> list[ToolCall] | None:
    """Read the calls of DeepSeek V3 and R1 (a block of code) and V3.1 (plain JSON)."""
    return _read_matches(
        _DEEPSEEK,
        body,
        lambda match: (match["old"] or match["name"], match["code"] or match["plain"] or "", ""),
    )


def read_kimi(body: str, schemas: Schemas) -> list[ToolCall] | None:
    """Read the calls of Kimi K2, whose ids are part of its prompts."""

    def parts(match: re.Match[str]) -> tuple[str, str, str]:
        own_id = match["id"].strip()
        name, _, number = own_id.removeprefix("functions.").rpartition(":")
        return (name if name and number.isdecimal() else own_id), match["arguments"], own_id

    return _read_matches(_KIMI, body, parts)


def read_gemma(body: str, schemas: Schemas) -> list[ToolCall] | None:
    """Read call:NAME{key:<|"|>text<|"|>,other:1} of Gemma 4: JSON with other quotes."""
    match = re.fullmatch(r"\s*call:([\w.\-]+)(\{.*\})\s*", body, re.DOTALL)
    if match is None:
        return None
    parts = match[2].split('<|"|>')  # each second one is a text
    for at, part in enumerate(parts):
        parts[at] = json.dumps(part) if at % 2 else _BARE_KEY.sub(r'\1"\2":', part)
    try:
        (value,) = _json_values("".join(parts))
        return [ToolCall(match[1], _arguments(value))]
    except (ValueError, RecursionError):
        return None


def _read_matches(
    pattern: re.Pattern[str], body: str, parts: Callable[[re.Match[str]], tuple[str, str, str]]
) -> list[ToolCall] | None:
    """Read a text of matches alone; parts: name, JSON and id of a call."""
    calls = []
    for match in _only(pattern, body):
        if match is None:
            return None
        name, arguments, own_id = parts(match)
        try:
            (value,) = _json_values(arguments)
            calls.append(ToolCall(name.strip(), _arguments(value), own_id))
        except (ValueError, RecursionError):
            return None
    return calls or None


def _read_elements(
    element: re.Pattern[str], parameter: re.Pattern[str], body: str, schemas: Schemas
) -> list[ToolCall] | None:
    calls = []
    for match in _only(element, body):
        if match is None:
            return None
        found = _parameters(parameter, match[2], schemas.get(match[1]))
        if found is None:
            return None
        calls.append(ToolCall(match[1], _json_text(found)))
    return calls or None


def _parameters(pattern: re.Pattern[str], text: str, schema: Any) -> dict[str, Any] | None:
    """Return the parameters, which are a text of matches alone; None for another text."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    found: dict[str, Any] = {}
    for match in _only(pattern, text.rstrip()):
        if match is None:
            return None
        name = match[1].strip()
        own = properties.get(name) if isinstance(properties, Mapping) else None
        found[name] = _value(match[2].removeprefix("\n").removesuffix("\n"), own)
    return found


def _only(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str] | None]:
    """Yield the matches that the text consists of, then None if there is other text."""
    at = 0
    while text[at:].strip():
        match = pattern.match(text, at)
        yield match
        if match is None:
            return
        at = match.end()


def _value(text: str, schema: Any) -> Any:
    """Return a value that is written as it is if it is a text, and as JSON otherwise."""
    if isinstance(schema, Mapping):
        kinds = [schema, *(each for each in schema.get("anyOf") or () if isinstance(each, Mapping))]
        if any(_is_text(each) for each in kinds):
            return text
    try:
        (value,) = _json_values(text)
    except (ValueError, RecursionError):
        return text
    return value


def _is_text(schema: Mapping[str, Any]) -> bool:
    kind = schema.get("type")
    return kind == "string" or (isinstance(kind, list) and "string" in kind)


def _call_of(value: Any) -> ToolCall:
    """Return the call that a JSON object describes. Raises ValueError for any other value."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("not a call")
    given = value.get("arguments", value.get("parameters"))
    own_id = value.get("id")
    return ToolCall(value["name"], _arguments(given), own_id if isinstance(own_id, str) else "")


def _arguments(value: Any) -> str:
    """Return arguments as JSON text. Raises ValueError unless they are an object."""
    if isinstance(value, str):
        (value,) = _json_values(value)
    if value is not None and not isinstance(value, dict):
        raise ValueError("not an object")
    return _json_text(value or {})


def _json_text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(value)
    return text


def _reject(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_reject)


def _json_values(text: str, separators: str = "") -> list[Any]:
    """Return the JSON values that a text consists of. Raises ValueError, RecursionError."""
    values, at = [], 0
    ignored = f" \t\r\n{separators}"
    while at < len(text):
        if text[at] in ignored:
            at += 1
        else:
            value, at = _DECODER.raw_decode(text, at)
            values.append(value)
    return values
