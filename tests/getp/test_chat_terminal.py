"""The chat on a terminal: pastes, typing during an answer, history, Ctrl-C and Ctrl-D."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# A chat whose answers repeat the last message; those to messages that begin with "slow" take time.
# The engine does not need torch, which takes seconds to import.
CHAT = """
import os, signal, time
from types import SimpleNamespace
from engine import Completion, SamplingParams
from getp.text.answer_text import AnswerOptions
from getp.text.chat_session import ChatSettings, chat
from tokenizer import Tokenizer

tokenizer = Tokenizer.load("data/model")

class FakeEngine:
    model_config = SimpleNamespace(max_positions=100_000)

    @property
    def max_positions(self):  # read between the prompt and the answer
        if "LATE_CTRL_C" in os.environ:
            os.kill(os.getpid(), signal.SIGINT)
        return 100_000

    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass

    def generate(self, requests):
        for request in requests:
            ids = []
            for token in answer(request.prompt_ids):
                ids.append(token)
                if request.on_token(token):
                    break
            yield Completion(0, ids, "stop", finished=1.0)

def answer(prompt):
    text = tokenizer.decode(prompt, skip_special=False)
    message = text.rsplit("<|start|>user<|message|>", 1)[1].partition("<|end|>")[0]
    yield from tokenizer.encode(f"<|channel|>final<|message|>got {message[:200]!r}")
    if message.startswith("slow"):
        for token in tokenizer.encode(" and so on" * 40):
            time.sleep(0.005)
            yield token
    yield from tokenizer.encode(" end.<|return|>")

chat(ChatSettings(SamplingParams(), AnswerOptions(chat=True)), None, tokenizer, FakeEngine())
"""
CTRL_C, CTRL_D, ENTER, ESC_ENTER, UP = "\x03", "\x04", "\r", "\x1b\r", "\x1b[A"
PASTE, PASTE_END = "\x1b[200~", "\x1b[201~"
PASTES_MARKED, PASTES_NOT_MARKED = b"\x1b[?2004h", b"\x1b[?2004l"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x08")


class Terminal:
    """A program on a pseudo-terminal, and everything that it has written there."""

    def __init__(self, command: list[str], **streams: Any) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.output = b""
        self.screen = ""  # the output without control sequences
        self.position = 0  # what `wait_for` has not looked at begins here
        terminal = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)},
            preexec_fn=self._own_terminal,
            **{**terminal, **streams},
        )

    def _own_terminal(self) -> None:
        os.setsid()
        import fcntl

        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal

    def type(self, text: str) -> None:
        data = text.encode()
        while data:
            # A terminal takes no more than its program reads, so what it shows is read meanwhile.
            self._read(0)
            if select.select([], [self.master], [], 1)[1]:
                data = data[os.write(self.master, data[:512]) :]

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """Return what appeared since the last call, up to and including `text`."""
        end = time.monotonic() + seconds
        while text not in self.screen[self.position :]:
            assert time.monotonic() < end, f"no {text!r} in {self.screen[self.position :]!r}"
            self._read(0.1)
        start, self.position = self.position, self.screen.index(text, self.position) + len(text)
        return self.screen[start : self.position]

    def wait(self) -> int:
        end = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < end:
            self._read(0.1)
        self._read(0.1)
        return self.process.wait(1)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def _read(self, seconds: float) -> None:
        while select.select([self.master], [], [], seconds)[0]:
            self.output += os.read(self.master, 65536)
            self.screen = _CONTROL.sub("", self.output.decode(errors="replace"))
            seconds = 0


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal([sys.executable, "-c", CHAT])
    terminal.wait_for(">")
    yield terminal
    terminal.close()


def test_pasted_lines_are_one_message(terminal: Terminal) -> None:
    terminal.type(f"{PASTE}one\rtwo\nthree{PASTE_END}{ENTER}")
    terminal.wait_for("got 'one\\ntwo\\nthree' end.")
    terminal.type(f"/system{PASTE} be kind\rand short{PASTE_END}{ENTER}")
    terminal.wait_for("system prompt set")


def test_esc_enter_begins_a_new_line(terminal: Terminal) -> None:
    terminal.type(f"one{ESC_ENTER}two{ENTER}")
    terminal.wait_for("got 'one\\ntwo' end.")


def test_typing_during_an_answer_is_kept_apart_and_goes_to_the_next_prompt(
    terminal: Terminal,
) -> None:
    terminal.type(f"slow{ENTER}")
    terminal.wait_for("got 'slow'")
    terminal.type("XYZ")
    answer = terminal.wait_for(" end.")
    assert answer.replace("\r\n", "") == " and so on" * 40 + " end."
    assert "XYZ" in terminal.wait_for("XYZ")  # in the editor, below the answer
    terminal.type(f"!{ENTER}")
    terminal.wait_for("got 'XYZ!' end.")


def test_a_message_sent_during_an_answer_is_answered_next(terminal: Terminal) -> None:
    terminal.type(f"slow{ENTER}")
    terminal.wait_for("got 'slow'")
    terminal.type(f"first{ENTER}{PASTE}second\rline{PASTE_END}{ENTER}")
    assert "first" not in terminal.wait_for(" end.")
    terminal.wait_for("got 'first' end.")
    terminal.wait_for("got 'second\\nline' end.")


def test_ctrl_c_stops_an_answer_and_keeps_what_was_typed(terminal: Terminal) -> None:
    terminal.type(f"slow{ENTER}")
    terminal.wait_for("got 'slow'")
    terminal.type(f"later{CTRL_C}")
    stopped = terminal.wait_for("stopped]")
    assert " end." not in stopped
    terminal.type(ENTER)
    terminal.wait_for("got 'later' end.")


def test_ctrl_c_stops_an_answer_after_a_long_paste(terminal: Terminal) -> None:
    terminal.type(f"slow{ENTER}")
    terminal.wait_for("got 'slow'")
    terminal.type(f"{PASTE}{'long ' * 4000}{PASTE_END}{CTRL_C}")  # a terminal holds 4 KB
    assert " end." not in terminal.wait_for("stopped]")
    terminal.type(ENTER)
    terminal.wait_for("got 'long long")


def test_esc_during_an_answer_does_not_change_the_next_key(terminal: Terminal) -> None:
    terminal.type(f"slow{ENTER}")
    terminal.wait_for("got 'slow'")
    terminal.type("\x1b")
    terminal.wait_for("tokens cached")
    time.sleep(0.3)
    terminal.type(f"back{ENTER}")
    terminal.wait_for("got 'back' end.")


def test_arrow_keys_find_earlier_messages(terminal: Terminal) -> None:
    for text in ("one", "two"):
        terminal.type(f"{text}{ENTER}")
        terminal.wait_for("tokens cached")
        terminal.wait_for(">")
    time.sleep(0.3)  # the editor loads its history after it has drawn the prompt
    terminal.type(f"{UP}{UP}{ENTER}")
    terminal.wait_for("got 'one' end.")


def test_ctrl_d_ends_the_chat_and_restores_the_terminal(terminal: Terminal) -> None:
    terminal.type(f"one{ENTER}")
    terminal.wait_for("tokens cached")
    terminal.wait_for(">")
    assert terminal.output.rindex(PASTES_MARKED) > terminal.output.rindex(b"got 'one'")
    terminal.type(CTRL_D)
    assert terminal.wait() == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before
    assert terminal.output.rindex(PASTES_NOT_MARKED) > terminal.output.rindex(PASTES_MARKED)


def test_ctrl_c_discards_a_message_and_twice_ends_the_chat(terminal: Terminal) -> None:
    terminal.type(f"forget this{CTRL_C}")
    terminal.wait_for("Ctrl-C again")
    terminal.type(f"one{ENTER}")
    terminal.wait_for("tokens cached")
    terminal.wait_for(">")
    terminal.type(CTRL_C)
    terminal.wait_for("Ctrl-C again")
    terminal.wait_for(">")
    terminal.type(CTRL_C)
    assert terminal.wait() == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_ctrl_c_outside_an_answer_does_not_end_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATE_CTRL_C", "")
    terminal = Terminal([sys.executable, "-c", CHAT])
    for text in ("one", "two", "three", "four"):
        terminal.wait_for(">")
        terminal.type(f"{text}{ENTER}")
        terminal.wait_for(f"got '{text}' end.")
    terminal.close()


def test_redirected_answers_contain_no_prompt() -> None:
    terminal = Terminal([sys.executable, "-c", CHAT], stdout=subprocess.PIPE)
    terminal.wait_for(">")
    terminal.type(f"one{ENTER}")
    terminal.wait_for("tokens cached")
    terminal.type(CTRL_D)
    assert terminal.wait() == 0
    assert terminal.process.stdout is not None
    assert terminal.process.stdout.read() == b"got 'one' end.\n"
    terminal.close()


def test_the_command_chats_on_a_terminal() -> None:
    terminal = Terminal([sys.executable, "run.py", "-m", "chat", "--device", "cpu"])
    terminal.wait_for(">")
    terminal.type(f"{PASTE}What is{ENTER}17 plus 25?{PASTE_END}{ENTER}")
    terminal.wait_for("tokens cached]")
    terminal.type(f"/help{ENTER}")
    assert "Esc Enter" in terminal.wait_for("goes into the next message.")
    terminal.type(f"/quit{ENTER}")
    assert terminal.wait() == 0
    terminal.close()
