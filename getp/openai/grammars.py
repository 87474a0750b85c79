"""The fields of a request that say what its answer must match: OpenAI's, and those of vLLM."""

import json
from collections.abc import Callable
from typing import Any

from engine import Grammar
from getp.openai.parsed import BadRequestError, ParsedBody

_FORMATS = "{'type': 'text'}, {'type': 'json_object'} or {'type': 'json_schema', 'json_schema': …}"


_MAX_LENGTH = 1 << 18  # characters of a grammar, whose compilation delays other requests


def _invalid(name: str, wanted: str) -> BadRequestError:
    return BadRequestError("invalid_value", f"{name!r} must be {wanted}")


def read_response_format(body: ParsedBody, name: str, value: Any) -> None:
    """Read OpenAI's `response_format`. Raises BadRequestError."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return
    if kind == "json_object":
        _set(body, name, Grammar.json_object())
    elif kind == "json_schema":
        given = value.get("json_schema")
        if not isinstance(given, dict) or "schema" not in given:
            raise _invalid(name, "an object whose 'json_schema' has a 'schema'")
        _set(body, name, _schema(name, given["schema"]))
    else:
        raise _invalid(name, f"{_FORMATS}; other types are not supported")


def read_guided(body: ParsedBody, name: str, value: Any) -> None:
    """Read one of vLLM's fields `guided_json` … `guided_grammar`. Raises BadRequestError."""
    _set(body, name, _READERS[name.removeprefix("guided_")](name, value))


def read_structured_outputs(body: ParsedBody, name: str, value: Any) -> None:
    """Read vLLM's `structured_outputs`, an object with one of the same. Raises BadRequestError."""
    given = value if isinstance(value, dict) else {}
    given = {key: entry for key, entry in given.items() if entry is not None and entry is not False}
    if len(given) != 1:
        raise _invalid(name, f"an object with one of {', '.join(_READERS)}")
    ((key, entry),) = given.items()
    if key not in _READERS:
        raise BadRequestError("unsupported_parameter", f"{name!r} does not support {key!r}")
    _set(body, name, _READERS[key](f"{name}.{key}", entry))


def _set(body: ParsedBody, name: str, grammar: Grammar) -> None:
    if "grammar" in body.params:
        first = body.names["grammar"]
        raise BadRequestError(
            "invalid_value", f"{first!r} and {name!r} are both given: give only one of them"
        )
    if len(grammar.text) > _MAX_LENGTH:
        raise _invalid(name, f"a grammar of at most {_MAX_LENGTH} characters")
    body.params["grammar"] = grammar
    body.names["grammar"] = name


def _schema(name: str, value: Any) -> Grammar:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _invalid(name, f"a JSON schema, but its text is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _invalid(name, "a JSON schema that is an object")
    return Grammar.json_schema(value)


def _object(name: str, value: Any) -> Grammar:
    if value is not True:
        raise _invalid(name, "true or false")
    return Grammar.json_object()


def _choice(name: str, value: Any) -> Grammar:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise _invalid(name, "a list of at least one string")
    return Grammar.choice(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _invalid(name, "a string that is not empty")
    return value


_READERS: dict[str, Callable[[str, Any], Grammar]] = {
    "json": _schema,
    "json_object": _object,
    "regex": lambda name, value: Grammar("regex", _text(name, value)),
    "choice": _choice,
    "grammar": lambda name, value: Grammar("lark", _text(name, value)),
}
