"""The messages of OpenAI's chat completions, as chat templates expect them.

OpenAI writes the arguments of a tool call as a JSON string and absent values as null; templates
expect an object, and no key.
"""

import json
from typing import Any

from getp.openai.parsed import BadRequestError
from tokenizer import Message


def read_messages(value: Any) -> list[Message]:
    """Return the messages; an assistant's content may be None. Raises BadRequestError."""
    if not isinstance(value, list) or not value:
        raise _invalid("'messages' must be a list of at least one message")
    return [_read_message(entry, number) for number, entry in enumerate(value, start=1)]


def _invalid(problem: str) -> BadRequestError:
    return BadRequestError("invalid_value", problem)


def _read_message(entry: Any, number: int) -> Message:
    where = f"message {number} of 'messages'"
    if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
        raise _invalid(f"{where} must be an object with a 'role'")
    message = {name: value for name, value in entry.items() if value is not None}
    message["content"] = _content(entry.get("content"), where, entry["role"] == "assistant")
    calls = message.pop("tool_calls", [])
    if not isinstance(calls, list):
        raise _invalid(f"{where}: 'tool_calls' must be a list")
    if calls:
        message["tool_calls"] = [_read_call(call, where) for call in calls]
    return message


def _content(content: Any, where: str, optional: bool) -> str | None:
    """Return the text of a message; an `optional` one may be None."""
    if isinstance(content, list):
        other = next((part for part in content if not _is_text(part)), None)
        if other is not None:
            raise BadRequestError(
                "unsupported_content",
                f"{where}: 'content' has the part {other!r:.60}, but only parts with the type "
                "'text' and a 'text' are supported",
            )
        return "".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and optional):
        raise _invalid(f"{where}: 'content' must be a string or a list of parts of type 'text'")
    return content


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _read_call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _invalid(f"{where}: every tool call must have a 'function' with a 'name'")
    arguments = function.get("arguments") or {}  # "" and null: a call without arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise _invalid(
                f"{where}: the arguments of {function['name'][:80]!r} are not valid JSON: {error}"
            ) from error
    if not isinstance(arguments, dict):
        raise _invalid(f"{where}: the arguments of {function['name'][:80]!r} must be a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}
