"""Errors of the engine: message templates in which callers can rename the engine's settings."""

import re
from collections.abc import Callable
from typing import Any

_NAME = re.compile(r"\{([a-z_]+)\}")


class EngineError(ValueError):
    """The engine cannot run with these settings or this request; the message gives a remedy.

    `text` holds names in braces. A name in `fields` stands for that value (an EngineError among
    the values is rendered as part of the sentence). Any other name stands for a setting: a field of
    EngineConfig or SamplingParams. `str(error)` writes settings by these Python names; `worded`
    lets a command line write its options and a server its request fields.
    """

    def __init__(self, text: str, **fields: Any):
        super().__init__(text)
        self.text, self.fields = text, fields

    def worded(self, name_of: Callable[[str], str]) -> str:
        """The message with each setting written as `name_of(setting)`."""

        def render(match: "re.Match[str]") -> str:
            name = match[1]
            if name not in self.fields:
                return name_of(name)
            value = self.fields[name]
            return value.worded(name_of) if isinstance(value, EngineError) else str(value)

        return _NAME.sub(render, self.text)

    def template(self) -> str:
        """The message with its values filled in and settings still in braces."""
        return self.worded("{{{}}}".format)

    def __str__(self) -> str:
        return self.worded(str)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.text, self.fields)


class RequestError(EngineError):
    """One request cannot run, or cannot continue; other requests are not affected."""


class GrammarError(RequestError):
    """The grammar of a request cannot be used."""


def _rebuild(kind: type[EngineError], text: str, fields: dict[str, Any]) -> EngineError:
    return kind(text, **fields)
