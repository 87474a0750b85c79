"""Signals that end a job: running requests may finish after the first; the second kills it."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from getp.errors import Interrupted
from getp.terminal import print_message

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class GraceExpired(Exception):
    """The time for running requests to finish is over; the next run completes them."""


class GracefulStop:
    """Handles SIGINT, SIGTERM and SIGHUP while it is entered.

    The first signal requests a stop. While `allow_grace` is false, there are no requests to wait
    for, and the signal ends the block with Interrupted. For the second signal the default handler
    is installed, so the kernel ends the process at once.
    """

    def __init__(self, grace_s: float) -> None:
        self.allow_grace = False
        self.signal: int | None = None  # the first signal received
        self._grace_s = grace_s
        self._deadline = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                    self._previous_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            raise self.interrupted("interrupted") from None

    @property
    def requested(self) -> bool:
        """Whether a stop was requested, so that no new request may start."""
        return self.signal is not None

    def check(self) -> None:
        """Raise GraceExpired once the time for running requests is over."""
        if self.signal is not None and time.monotonic() > self._deadline:
            raise GraceExpired

    def interrupted(self, message: str) -> Interrupted:
        """Return the error with which a stopped job ends."""
        return Interrupted(message, self.signal or signal.SIGINT)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._deadline = time.monotonic() + self._grace_s
        for each in self._previous_handlers:
            signal.signal(each, signal.SIG_DFL)
        if not self.allow_grace:
            # Not an Exception, because Thread.start would replace an Exception by its own.
            raise KeyboardInterrupt
        print_message(
            f"stopping: waiting up to {self._grace_s:g} s for running requests; press Ctrl-C again "
            "to stop now"
        )
