"""All messages that a user can see, found in the source: errors, warnings, help.

`python -m tests.getp.test_messages` prints them for reading.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = ("getp", "engine", "model", "tokenizer")

_FUNCTIONS = {
    "print_message",
    "warn",
    "hint",
    "fail",
    "notice",
    "_notice",
    "_fail",
    "print",
    "check_writable",
}
_HELP = {"help", "epilog"}


class Message(NamedTuple):
    """A message, with … for each value in an f-string."""

    file: str
    line: int
    text: str
    literal: bool  # not an f-string
    has_fields: bool  # keyword arguments besides the text: names in braces are replaced


def messages(root: Path = ROOT) -> list[Message]:
    """Return every message in the source of the product, file by file."""
    found: list[Message] = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
                found += _of_call(call, str(path.relative_to(root)))
    return found


def _of_call(call: ast.Call, file: str) -> Iterator[Message]:
    arguments = [keyword.value for keyword in call.keywords if keyword.arg in _HELP]
    if _is_error_or_output(call):
        arguments += call.args
    for argument in arguments:
        for part in _strings(argument):
            text = _text(part)
            if " " in text:  # not a code such as "invalid_value"
                fields = any(keyword.arg not in (*_HELP, None) for keyword in call.keywords)
                literal = isinstance(part, ast.Constant)
                yield Message(file, part.lineno, text, literal, fields)


def _is_error_or_output(call: ast.Call) -> bool:
    function = call.func
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    is_error = name.endswith(("Error", "Problem", "Interrupted", "Failure", "_invalid"))
    return is_error or name in _FUNCTIONS


def _strings(node: ast.expr) -> Iterator[ast.expr]:
    """Yield the outermost strings of an argument."""
    if isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    ):
        yield node
    elif isinstance(node, ast.BinOp):
        yield from _strings(node.left)
        yield from _strings(node.right)
    elif isinstance(node, ast.IfExp):
        yield from _strings(node.body)
        yield from _strings(node.orelse)


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    assert isinstance(node, ast.JoinedStr)
    return "".join(
        str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
    )
