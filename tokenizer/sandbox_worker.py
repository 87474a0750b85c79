"""The program of the sandbox's process: renders the chat templates that it receives.

It is run by its path with three arguments: the bytes of memory and the characters of text that a
rendering may take, and the number of a socket that carries nothing and closes when the other side
ends. It imports nothing but Jinja and the standard library. A request is JSON. A reply is `+` and
a text, or `-` and an error message. Before each is its length, in eight bytes.
"""

import contextlib
import errno
import fcntl
import json
import os
import resource
import select
import signal
import sys
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_MESSAGE = 1000  # characters


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text; only its body matters."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it the same way

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Replace the block by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, >, & and '; no model was trained on such text.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


# As transformers' apply_chat_template has it, so that templates on the Hub run unchanged.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
)
_ENVIRONMENT.filters["tojson"] = _tojson
_ENVIRONMENT.globals["raise_exception"] = _raise_exception


@lru_cache(maxsize=8)
def _compiled(source: str) -> tuple[str, jinja2.Template]:
    """Return the names of the variables that a template uses, and the template."""
    names = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
    return " ".join(names), _ENVIRONMENT.from_string(source)


def _reply(
    source: str, max_text: int, names: dict[str, Any] | None = None, now: str | None = None
) -> str:
    """Return the reply to a request; without `names` it asks for the template's variables."""
    problem = "the chat template is not valid"
    try:
        variables, template = _compiled(source)
        if names is None:
            return f"+{variables}"
        problem = "the chat template failed"
        moment = datetime.fromisoformat(now) if now else datetime.now()
        pieces, left = ["+"], max_text
        for piece in template.generate({"strftime_now": moment.strftime, **names}):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise ValueError(f"it creates more than {max_text} characters of text")
        return "".join(pieces)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program: it can raise anything
        return f"-{problem}: {str(error)[:_MAX_MESSAGE]}"


def _limit_memory(extra: int) -> None:
    """Limit the address space to what is in use and `extra` bytes, where the system tells that."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        given = [n for n in resource.getrlimit(resource.RLIMIT_AS) if n != resource.RLIM_INFINITY]
        limit = min([pages * resource.getpagesize() + extra, *given])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with(other_side: int) -> None:
    """Let SIGIO end this process when the socket `other_side` closes.

    It does so at once, even within a function of Python's that does not return for minutes. The
    socket of the requests cannot serve for this: its SIGIO for a request may come after the
    request itself, and would end the process during the rendering.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(other_side, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(other_side, fcntl.F_SETFL, fcntl.fcntl(other_side, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([other_side], [], [], 0)[0]:  # it has closed already
        sys.exit()


def main() -> None:
    """Answer requests until the other side closes the socket that is both input and output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    max_memory, max_text, other_side = map(int, sys.argv[1:])
    _end_with(other_side)
    _limit_memory(max_memory)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    replies.write(b"r")  # ready
    replies.flush()
    while header := requests.read(8):
        data = requests.read(int.from_bytes(header, "little"))
        request = json.loads(data.decode("utf-8", "surrogatepass"))
        reply = _reply(max_text=max_text, **request).encode("utf-8", "surrogatepass")
        replies.write(len(reply).to_bytes(8, "little"))
        replies.write(reply)
        replies.flush()


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        os._exit(errno.ENOMEM)
