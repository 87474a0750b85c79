"""Shows an answer on the screen while it is generated."""

from typing import TextIO

from getp.terminal import DIM, NORMAL, strip_control_characters
from tokenizer.harmony import FINAL, ChannelText


class Screen:
    """Writes an answer piece by piece: final text to one stream, other channels to another.

    On a terminal, control characters are removed, so that the model cannot move the cursor or
    change colours; files and pipes get the text unchanged.
    """

    def __init__(self, out: TextIO, aside: TextIO) -> None:
        self._out = out
        self._aside = aside
        # Channel, recipient and number of the last piece's message; None: final.
        self._channel: tuple[str, str | None, int] | None = None
        self._last = "\n"  # last character written, on either stream

    def show(self, piece: ChannelText) -> None:
        """Write a piece of the answer at once."""
        if not piece.text:
            return
        if piece.channel == FINAL:
            self._leave_channel()
            self._write(self._out, piece.text)
            return
        message = (piece.channel, piece.recipient, piece.message if piece.recipient else 0)
        if message != self._channel:
            self._leave_channel()
            if self._last != "\n":  # a preamble of the answer
                self._write(self._aside, "\n")
            title = " to ".join(filter(None, message[:2]))
            shown = strip_control_characters(title) if self._aside.isatty() else title
            self._aside.write((DIM if self._aside.isatty() else "") + f"[{shown}] ")
            self._channel = message
        self._write(self._aside, piece.text)

    def end(self) -> None:
        """End the answer: the next output starts on a new line."""
        self._leave_channel()
        if self._last != "\n":
            self._write(self._out, "\n")

    def _leave_channel(self) -> None:
        if self._channel is None:
            return
        line_end = "" if self._last == "\n" else "\n"
        self._aside.write((NORMAL if self._aside.isatty() else "") + line_end)
        self._aside.flush()
        self._channel, self._last = None, "\n"

    def _write(self, stream: TextIO, text: str) -> None:
        shown = strip_control_characters(text) if stream.isatty() else text
        stream.write(shown)
        stream.flush()
        self._last = shown[-1:] or self._last
