"""The progress of a job on standard error: a bar on a terminal, regular lines in a log."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from engine import EngineStats
from getp.terminal import print_message

_LINE_INTERVAL_S = 10.0
_BAR_INTERVAL_S = 0.25
_SAMPLE_INTERVAL_S = 0.5
_WINDOW_S = 10.0  # of the rates that are shown
_LONG_WINDOW_S = 60.0  # of the rate from which the time left follows


class Counts(Protocol):
    """The counts of a job's requests; a journal has them."""

    total: int
    done: int  # finished requests, those that failed included
    failed: int


class Tracker:
    """The speed of a job over the last seconds, and the time that is left.

    The requests left are expected to generate as many tokens each as have been generated for each
    request that succeeded. This counts the tokens of requests that are still running, because those
    that finish first are the short ones.
    """

    def __init__(
        self,
        counts: Counts,
        stats: Callable[[], EngineStats],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counts, self._stats, self._clock = counts, stats, clock
        self._succeeded_before = counts.done - counts.failed
        # (time, generated tokens, prompt tokens computed), as far back as rates need.
        self._samples: deque[tuple[float, int, int]] = deque()
        self.sample()
        self._generated_before = self._samples[0][1]

    def sample(self) -> None:
        """Note the tokens so far."""
        stats, now = self._stats(), self._clock()
        self._samples.append((now, stats.generated_tokens, stats.prefill_tokens))
        while now - self._samples[1 if len(self._samples) > 1 else 0][0] > _LONG_WINDOW_S:
            self._samples.popleft()

    def seconds_left(self) -> float | None:
        """Return the time left; None if it is not known yet."""
        counts = self._counts
        succeeded = counts.done - counts.failed - self._succeeded_before
        rate, _ = self._rates(_LONG_WINDOW_S)
        if not succeeded or not rate:
            return None
        each = (self._samples[-1][1] - self._generated_before) / succeeded
        return (counts.total - counts.done) * each / rate

    def text(self) -> str:
        """Return the progress in words."""
        counts = self._counts
        failed = f", {counts.failed} failed" if counts.failed else ""
        rate, reading = self._rates(_WINDOW_S)
        speed = f"{rate:,.0f} tok/s"
        if reading and not rate:
            speed = f"reading prompts at {reading:,.0f} tok/s"
        left = self.seconds_left()
        time_left = "" if left is None else f", about {_duration(left)} left"
        requests = f"{counts.done - counts.failed} of {counts.total} requests"
        return f"{requests}{failed}, {speed}{time_left}"

    def _rates(self, window_s: float) -> tuple[float, float]:
        """Return generated tokens and prompt tokens per second over the last seconds."""
        now, generated, prompts = self._samples[-1]
        since = next(each for each in self._samples if now - each[0] <= window_s)
        seconds = now - since[0]
        if not seconds:
            return 0.0, 0.0
        return (generated - since[1]) / seconds, (prompts - since[2]) / seconds


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress(
    counts: Counts, stats: Callable[[], EngineStats], note: Callable[[EngineStats], None]
) -> Iterator[None]:
    """Show progress while the block runs; `counts` and `stats` are read from another thread.

    note: is called with the statistics at each sample.
    """
    console = Console(stderr=True)

    def noted() -> EngineStats:
        found = stats()
        note(found)
        return found

    tracker = Tracker(counts, noted)
    if not console.is_terminal:
        with _regularly(tracker, _LINE_INTERVAL_S, lambda: print_message(tracker.text())):
            yield
        return
    columns = BarColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(tracker.text(), total=counts.total, completed=counts.done)

        def show() -> None:
            bar.update(task, completed=counts.done, description=tracker.text(), refresh=True)

        with _regularly(tracker, _BAR_INTERVAL_S, show):
            yield


@contextmanager
def _regularly(tracker: Tracker, interval_s: float, show: Callable[[], None]) -> Iterator[None]:
    """Call `show` in this interval, in a thread, and sample often enough for the rates."""
    ended = threading.Event()

    def run() -> None:
        shown = time.monotonic()
        while not ended.wait(min(interval_s, _SAMPLE_INTERVAL_S)):
            tracker.sample()
            if time.monotonic() - shown >= interval_s * 0.99:
                shown = time.monotonic()
                show()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
