"""Standard streams that the shell has closed (`<&-`, `>&-`): Python has None in their place."""

import io
import os
import sys
from typing import Any, NoReturn

from getp.errors import GetpError


def open_closed_streams() -> None:
    """Replace each closed stream, so that it can be named in an error.

    Reading or writing it raises GetpError; what is written to standard error is dropped. Their file
    descriptors are opened as well: otherwise the next file that is opened would get the number, and
    messages of a library would be written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
    if sys.stdin is None:
        sys.stdin = _stream(0, "input")
    if sys.stdout is None:
        sys.stdout = _stream(1, "output")
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - it stays open


def refuse_closed_output() -> None:
    """Raise GetpError if standard output is closed, so that results cannot be written there."""
    if isinstance(sys.stdout.buffer, _Closed):
        sys.stdout.buffer.write(b"")


def _stream(descriptor: int, name: str) -> io.TextIOWrapper:
    closed: Any = _Closed(descriptor, name)
    return io.TextIOWrapper(closed, write_through=True)


class _Closed(io.RawIOBase):
    """A stream that raises GetpError when it is read or written."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name = descriptor, name

    def readable(self) -> bool:
        return self._descriptor == 0

    def writable(self) -> bool:
        return self._descriptor != 0

    def fileno(self) -> int:
        return self._descriptor

    def readinto(self, buffer: Any) -> NoReturn:
        raise GetpError(f"cannot read standard {self._name}: it is closed")

    def write(self, data: Any) -> NoReturn:
        raise GetpError(f"cannot write to standard {self._name}: it is closed")
