"""The terminal: messages on standard error, and Ctrl-C."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from getp.errors import GetpError

DIM, NORMAL = "\x1b[2m", "\x1b[0m"
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def strip_control_characters(text: str) -> str:
    """Return `text` without control characters, which a terminal would interpret."""
    return _CONTROL.sub("", text)


def print_message(message: str, dim: bool = False) -> None:
    """Write a line on standard error: standard output is for results.

    Control characters are removed, because a message may quote a prompt or a file name. Errors are
    ignored, so that closing the terminal does not end the job. dim: on a terminal in a dim colour.
    """
    shown = strip_control_characters(message)
    with suppress(OSError):
        if dim and sys.stderr.isatty():
            shown = f"{DIM}{shown}{NORMAL}"
        print(shown, file=sys.stderr, flush=True)


def print_last_line(line: str) -> None:
    """Write a line on standard output after the work is done: if it fails, that is a message."""
    try:
        print(line, flush=True)
    except (OSError, GetpError) as error:
        discard_output()
        reason = getattr(error, "strerror", None) or error
        print_message(f"{line}\ngetp: that line is not on standard output: {reason}")


def discard_output() -> None:
    """Discard what standard output, which has failed, has buffered: it would fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warn(message: str) -> None:
    """Write a warning on standard error."""
    print_message(f"getp: warning: {message}")


@contextmanager
def catch_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Count Ctrl-C instead of raising KeyboardInterrupt; yield a function that tests for a press.

    An exception in the middle of a step would leave the engine in an inconsistent state. The third
    press does raise KeyboardInterrupt, in case the function is not called. Signals reach only the
    main thread; in another one nothing is counted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    presses = 0

    def on_signal(signum: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses == 3:
            raise KeyboardInterrupt

    previous_handler = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, previous_handler)
