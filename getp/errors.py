"""Errors that the command line prints as one line, and the exit statuses.

0: success. 1: the job or the program failed. 2: invalid options. 3: the job completed, but some of
its requests failed. 128 + N: ended by signal N (130: Ctrl-C).
"""

import re
import signal
from collections.abc import Callable
from typing import Any

SOME_FAILED = 3

NameOf = Callable[[str], str]
"""Maps a setting to the name that messages use for it, such as its command-line option."""

_FIELD = re.compile(r"\{([a-z_]+)\}")


class GetpError(Exception):
    """A run that cannot continue; the message is one sentence for the user.

    Without `fields` the text is the message. With them it is a template: a name in braces stands
    for its field or, if there is no such field, for a setting. `str(error)` writes settings by
    their Python names; `worded` lets a command line write its options instead.
    """

    exit_code = 1

    def __init__(self, text: str, **fields: Any) -> None:
        super().__init__(text)
        self.text, self.fields = text, fields

    def worded(self, name_of: NameOf) -> str:
        """Return the message with each setting written as `name_of(setting)`."""
        if not self.fields:
            return self.text

        def value(match: "re.Match[str]") -> str:
            name = match[1]
            return str(self.fields[name]) if name in self.fields else name_of(name)

        return _FIELD.sub(value, self.text)

    def __str__(self) -> str:
        return self.worded(str)


class UsageProblem(GetpError):
    """Settings that contradict each other, or a value that is not allowed."""

    exit_code = 2


class Interrupted(GetpError):
    """The user pressed Ctrl-C, or another signal ended the run."""

    def __init__(self, text: str, number: int = signal.SIGINT, **fields: Any) -> None:
        super().__init__(text, **fields)
        self.exit_code = 128 + number  # as a shell reports it


def worded(error: BaseException, name_of: NameOf) -> str:
    """Return the message of any error, with each setting written as `name_of(setting)`."""
    render = getattr(error, "worded", None)
    return str(error) if render is None else str(render(name_of))
