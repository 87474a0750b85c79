"""Signals that end a job: the first lets what runs finish for a while, the second ends at once."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from getp.errors import Interrupted
from getp.terminal import say

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ParkedError(Exception):
    """The time to finish is over: what still runs is left for the next time."""


class Stopping:
    """Notes SIGINT, SIGTERM and SIGHUP while it is entered.

    Where nothing runs that could finish (`patient` False), the first one ends the block:
    Interrupted leaves it.
    The second finds the system's own handling: the process is gone before any Python runs.
    """

    def __init__(self, grace_s: float) -> None:
        self.patient = False
        self.signal: int | None = None  # the one that came
        self._grace_s = grace_s
        self._deadline = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            raise self.interrupted("interrupted") from None

    @property
    def asked(self) -> bool:
        """Whether nothing new shall begin."""
        return self.signal is not None

    def check(self) -> None:
        """Raise ParkedError once the time to finish is over."""
        if self.signal is not None and time.monotonic() > self._deadline:
            raise ParkedError

    def interrupted(self, message: str) -> Interrupted:
        """Return the error that a stopped job ends with."""
        return Interrupted(message, self.signal or signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._deadline = time.monotonic() + self._grace_s
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        if not self.patient:
            # No Exception: Thread.start would take that for its own failure and raise another.
            raise KeyboardInterrupt
        say(f"stopping: running requests have {self._grace_s:g} s to finish; again: at once")
