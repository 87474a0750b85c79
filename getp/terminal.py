"""What a person at a terminal sees and presses: text as it comes, Ctrl-C, lines typed."""

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

from tokenizer.harmony import FINAL, ChannelText

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def visible(text: str) -> str:
    """Return `text` without what a terminal takes for a command."""
    return _CONTROL.sub("", text)


def say(message: str) -> None:
    """Write a line of our own, on standard error: standard output is for answers.

    It may quote a prompt or a file's name, so control characters are left out. A terminal that
    has been closed must not end a job.
    """
    with suppress(OSError):
        print(visible(message), file=sys.stderr, flush=True)


class Screen:
    """Writes an answer as it comes: its final text on one stream, its thinking on another.

    On a terminal the model's control characters are left out, so that no text can move the
    cursor, change colours or worse; elsewhere the text goes out as it is.
    """

    def __init__(self, out: TextIO, aside: TextIO) -> None:
        self._out = out
        self._aside = aside
        self._channel: str | None = None  # of the last piece, if it was not final
        self._last = "\n"  # last character written, on either stream

    def show(self, piece: ChannelText | None) -> None:
        """Write a piece of the answer at once."""
        if piece is None or not piece.text:
            return
        if piece.channel == FINAL:
            self._leave_channel()
            self._write(self._out, piece.text)
            return
        if piece.channel != self._channel:
            self._leave_channel()
            self._aside.write((_DIM if self._aside.isatty() else "") + f"[{piece.channel}] ")
            self._channel = piece.channel
        self._write(self._aside, piece.text)

    def end(self) -> None:
        """End the answer: whatever comes next begins a line."""
        self._leave_channel()
        if self._last != "\n":
            self._write(self._out, "\n")

    def _leave_channel(self) -> None:
        if self._channel is None:
            return
        line_end = "" if self._last == "\n" else "\n"
        self._aside.write((_PLAIN if self._aside.isatty() else "") + line_end)
        self._aside.flush()
        self._channel, self._last = None, "\n"

    def _write(self, stream: TextIO, text: str) -> None:
        shown = visible(text) if stream.isatty() else text
        stream.write(shown)
        stream.flush()
        self._last = shown[-1:] or self._last


@contextmanager
def ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C be asked about instead of breaking into whatever runs; yields the question.

    An exception in the middle of a step would leave the engine's books half written. The third
    press does raise KeyboardInterrupt, for when nobody comes to ask.
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
    """Yield the lines a user types, or those piped in, until their end.

    Ctrl-C at the prompt drops the line; a second one in a row is the end.
    """
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        _edit_lines()
    dropped = False
    while True:
        try:
            line = input(prompt) if at_terminal else sys.stdin.readline()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            if dropped or not at_terminal:
                say("")
                return
            say("\n(Ctrl-C again, Ctrl-D or /quit ends the chat)")
            dropped = True
            continue
        dropped = False
        if not at_terminal and not line:
            return
        yield line.rstrip("\r\n")


def _edit_lines() -> None:
    """Give `input` the usual keys and a history, where Python was built with readline."""
    with suppress(ImportError):
        import readline  # noqa: F401 - works by being imported
