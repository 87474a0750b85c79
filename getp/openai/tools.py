"""The tools of a chat: what a request says about them, and calls as responses have them."""

from collections.abc import Mapping
from typing import Any

from engine import Grammar
from getp.openai.parsed import BadRequestError, ParsedBody
from getp.text.parts.tool_bodies import ToolCall
from tokenizer import ChatTemplate

_CHOICES = "'none', 'auto', 'required' or {'type': 'function', 'function': {'name': …}}"
_MAX_TOOLS = 1024


def _invalid(name: str, wanted: str) -> BadRequestError:
    return BadRequestError("invalid_value", f"{name!r} must be {wanted}")


def read_tools(body: ParsedBody, name: str, value: Any) -> None:
    """Read `tools`, a list of functions. Raises BadRequestError."""
    if not isinstance(value, list) or len(value) > _MAX_TOOLS:
        raise _invalid(name, f"a list of at most {_MAX_TOOLS} tools")
    for number, tool in enumerate(value, start=1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise _invalid(name, f"a list of functions; tool {number} is not a function")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise _invalid(name, f"a list of functions; tool {number} has no 'name'")
        if not isinstance(function.get("parameters") or {}, dict):
            raise _invalid(
                name, f"a list of functions; tool {number}: 'parameters' is not an object"
            )
    body.tools = value


def read_tool_choice(body: ParsedBody, name: str, value: Any) -> None:
    """Read `tool_choice`; the name of one tool becomes a choice. Raises BadRequestError."""
    function = value.get("function") if isinstance(value, dict) else None
    if value in ("none", "auto", "required"):
        body.tool_choice = value
    elif isinstance(function, dict) and isinstance(function.get("name"), str):
        body.tool_choice, body.called_tool = "required", function["name"]
    else:
        raise _invalid(name, _CHOICES)


def read_parallel_calls(body: ParsedBody, name: str, value: Any) -> None:
    """Read `parallel_tool_calls`; false: at most one call. Raises BadRequestError."""
    if not isinstance(value, bool):
        raise _invalid(name, "true or false")
    body.answer["one_call"] = not value


def check_template(template: ChatTemplate) -> None:
    """Raise BadRequestError for a template without tools."""
    if "tools" not in template.variables:
        raise BadRequestError(
            "unsupported_parameter", "'tools': this model's chat template does not use tools"
        )


def check_tools(body: ParsedBody) -> None:
    """Make a forced call a grammar of the answer. Raises BadRequestError."""
    if body.tool_choice != "required":
        return
    known = [tool["function"]["name"] for tool in body.tools]
    if not known:
        raise BadRequestError("invalid_value", "'tool_choice' needs 'tools'")
    if body.called_tool is not None and body.called_tool not in known:
        shown = repr(body.called_tool[:80])
        raise BadRequestError("invalid_value", f"'tool_choice': {shown} is not one of 'tools'")
    if "grammar" in body.params:
        raise BadRequestError(
            "invalid_value",
            f"{body.names['grammar']!r} and a 'tool_choice' that forces a call are both given: "
            "give only one of them",
        )
    body.params["grammar"] = _call_grammar(body)
    body.names["grammar"] = "tool_choice"
    body.answer["forced_calls"] = True


def _call_grammar(body: ParsedBody) -> Grammar:
    """Return the grammar of a list of calls of the tools that may be called."""
    functions = [tool["function"] for tool in body.tools]
    if body.called_tool is not None:
        functions = [each for each in functions if each["name"] == body.called_tool][:1]
    shared: dict[str, Any] = {}
    calls = [_call_schema(function, shared) for function in functions]
    schema: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **shared}
    if body.called_tool is not None or body.answer.get("one_call"):
        schema["maxItems"] = 1
    return Grammar.json_schema(schema)


def _call_schema(function: Mapping[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a call; the definitions go to `shared`, since paths begin at the top."""
    parameters = {"type": "object", **(function.get("parameters") or {})}
    for key in ("$defs", "definitions"):
        for name, value in (parameters.pop(key, None) or {}).items():
            if shared.setdefault(key, {}).setdefault(name, value) != value:
                raise BadRequestError(
                    "invalid_value",
                    f"'tools': two of them define {name[:80]!r} in {key!r} differently",
                )
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def calls_of(calls: list[ToolCall], key: str) -> list[dict[str, Any]]:
    """Return calls as responses have them; key: of the answer, for ids that models do not write."""
    return [
        {
            "id": call.id or f"call_{key}_{number}",
            "type": "function",
            "function": {
                "name": call.recipient.removeprefix("functions."),
                "arguments": call.arguments,
            },
        }
        for number, call in enumerate(calls)
    ]
