"""The messages that a user types in a chat: from an editor on a terminal, or as plain lines."""

import select
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from getp.terminal import print_message

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings

_LFLAG, _IFLAG, _CC = 3, 0, 6  # positions in the list of termios.tcgetattr

EDITOR_HELP = """\
Enter sends the message; Esc Enter (or Alt-Enter) begins a new line. Pasted
lines are one message. The arrow keys recall earlier messages of this chat
(they are not saved). Text typed during an answer goes into the next message."""


class PlainInput:
    """Messages from a file or a pipe: each line is one message."""

    help = ""

    def __iter__(self) -> Iterator[str]:
        """Yield the lines until the input ends."""
        try:
            while line := sys.stdin.readline():
                yield line.rstrip("\r\n")
        except KeyboardInterrupt:
            print_message("")

    def collect(self) -> None:
        """Do nothing: a file waits until it is read."""


class Editor:
    """Messages that a user edits on the terminal, with a history of this chat in memory.

    Between the messages, `collect` keeps what the user types for the next one.
    """

    help = EDITOR_HELP

    def __init__(self, screen: TextIO, prompt: str = "> ") -> None:
        """screen: the terminal on which the user sees the text."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.input.vt100 import Vt100Input
        from prompt_toolkit.output.vt100 import Vt100_Output

        self._input = Vt100Input(sys.stdin)
        self._output = Vt100_Output.from_pty(screen)
        # The height below the prompt is not needed. The question for it delays the start by two
        # seconds on terminals that do not answer it.
        self._output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            prompt,
            input=self._input,
            output=self._output,
            multiline=True,
            prompt_continuation=" " * len(prompt),
            key_bindings=_key_bindings(),
        )

    def __iter__(self) -> Iterator[str]:
        """Yield the messages until Ctrl-D at an empty prompt, or Ctrl-C twice."""
        # Ctrl-C just after an answer has ended has nothing to stop: it must not end the chat.
        previous_handler = signal.signal(signal.SIGINT, lambda number, frame: None)
        try:
            yield from self._messages()
        finally:
            signal.signal(signal.SIGINT, previous_handler)

    def _messages(self) -> Iterator[str]:
        discarded = False
        while True:
            self.collect()
            self._input.flush_keys()  # drop an Esc: it would change the meaning of the next key
            try:
                text = self._session.prompt()
            except EOFError:
                return
            except KeyboardInterrupt:
                if discarded:
                    return
                print_message("(Ctrl-C again, Ctrl-D or /quit ends the chat)")
                discarded = True
                continue
            finally:
                self._expect_pastes()
            discarded = False
            # Bytes that are not UTF-8 are surrogates in the text.
            yield text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def collect(self) -> None:
        """Read what has been typed, without waiting; the next prompt gets it.

        A terminal holds only a few kilobytes that are not read, and then ignores Ctrl-C, too.
        """
        from prompt_toolkit.input.typeahead import store_typeahead

        while not self._input.closed and select.select([self._input.fileno()], [], [], 0)[0]:
            store_typeahead(self._input, self._input.read_keys())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Do not show what is typed while no message is edited. Ctrl-C is a signal as usual."""
        descriptor = self._input.fileno()
        before = termios.tcgetattr(descriptor)
        settings = termios.tcgetattr(descriptor)
        # A pressed key is available at once, Enter as the key that it is in the editor, and a
        # signal does not discard what was typed.
        settings[_LFLAG] = settings[_LFLAG] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
        settings[_IFLAG] &= ~termios.ICRNL
        settings[_CC][termios.VMIN], settings[_CC][termios.VTIME] = 1, 0
        termios.tcsetattr(descriptor, termios.TCSANOW, settings)
        self._expect_pastes()
        try:
            yield
        finally:
            self._output.disable_bracketed_paste()
            self._output.flush()
            termios.tcsetattr(descriptor, termios.TCSANOW, before)

    def _expect_pastes(self) -> None:
        """Have the terminal mark pasted text, also while no message is edited."""
        self._output.enable_bracketed_paste()
        self._output.flush()


def _key_bindings() -> "KeyBindings":
    """Return bindings for Enter, which sends the message, and Esc Enter, which does not."""
    from prompt_toolkit.filters import is_searching
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("enter", filter=~is_searching)
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=~is_searching)
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings


@contextmanager
def chat_input() -> Iterator[PlainInput | Editor]:
    """Context of a chat's input: an editor if the user types at a terminal, else plain lines."""
    screen = next((each for each in (sys.stdout, sys.stderr) if each.isatty()), None)
    if screen is None or not sys.stdin.isatty():
        yield PlainInput()
        return
    editor = Editor(screen)
    with editor.held():
        yield editor
