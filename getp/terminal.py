"""The terminal: messages on standard error, Ctrl-C, and lines that a user types."""

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def strip_control_characters(text: str) -> str:
    """Return `text` without the control characters that a terminal would obey."""
    return _CONTROL.sub("", text)


def say(message: str) -> None:
    """Write a line on standard error: standard output is for results.

    Control characters are removed, because a message may quote a prompt or a file name. A terminal
    that was closed does not end the job.
    """
    with suppress(OSError):
        print(strip_control_characters(message), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Write a warning on standard error."""
    say(f"getp: warning: {message}")


@contextmanager
def ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C instead of raising KeyboardInterrupt; yields a function: was it pressed?

    An exception in the middle of a step would leave the engine in an inconsistent state. The third
    press does raise KeyboardInterrupt, in case the function is not called.
    """
    presses = 0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses == 3:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)


def typed_lines(prompt: str) -> Iterator[str]:
    """Yield the lines that a user types, or the lines of a pipe, until the input ends.

    Ctrl-C at the prompt discards the line; a second Ctrl-C in a row ends the input.
    """
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        _enable_line_editing()
    discarded = False
    while True:
        try:
            line = input(prompt) if at_terminal else sys.stdin.readline()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            if discarded or not at_terminal:
                say("")
                return
            say("\n(Ctrl-C again, Ctrl-D or /quit ends the chat)")
            discarded = True
            continue
        discarded = False
        if not at_terminal and not line:
            return
        yield line.rstrip("\r\n")


def _enable_line_editing() -> None:
    """Give `input` the usual keys and a history, if Python was built with readline."""
    with suppress(ImportError):
        import readline  # noqa: F401 - importing it is enough
