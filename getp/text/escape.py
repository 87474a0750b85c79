"""Writes a text on one line, and reads it back."""

import re

_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_CHARACTERS = {escape: character for character, escape in _ESCAPES.items()}
_TO_ESCAPE, _ESCAPED = re.compile(r"[\\\n\r]"), re.compile(r"\\[\\nr]")


def escape(text: str) -> str:
    r"""Return `text` on one line: newlines as `\n`, carriage returns as `\r`, `\` as `\\`."""
    return _TO_ESCAPE.sub(lambda match: _ESCAPES[match[0]], text)


def unescape(line: str) -> str:
    """Return the text that `escape` wrote; any other backslash stays as it is."""
    return _ESCAPED.sub(lambda match: _CHARACTERS[match[0]], line)
