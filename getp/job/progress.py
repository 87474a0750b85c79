"""The progress of a job on standard error: a bar on a terminal, regular lines in a log."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from getp.terminal import print_message

_LINE_INTERVAL_S = 10.0


@contextmanager
def progress(total: int, output_tokens: Callable[[], int]) -> Iterator[Callable[[], None]]:
    """Show progress while the block runs; yields a function to call for each finished request.

    `output_tokens` returns the tokens generated so far; it is called from another thread.
    """
    console = Console(stderr=True)
    shown = _bar if console.is_terminal else _lines
    with shown(total, output_tokens, console) as advance:
        yield advance


@contextmanager
def _bar(
    total: int, output_tokens: Callable[[], int], console: Console
) -> Iterator[Callable[[], None]]:
    columns = [
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        _TokenRate(output_tokens),
        TimeRemainingColumn(),
        TextColumn("left"),
    ]
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("inference", total=total)
        yield lambda: bar.advance(task)


class _TokenRate(ProgressColumn):
    """Output tokens per second, over the whole run."""

    def __init__(self, output_tokens: Callable[[], int]) -> None:
        super().__init__()
        self._output_tokens = output_tokens

    def render(self, task: Task) -> Text:
        """Return the current rate."""
        return Text(f"{self._output_tokens() / max(task.elapsed or 0.0, 1e-9):,.0f} tok/s")


@contextmanager
def _lines(
    total: int, output_tokens: Callable[[], int], console: Console
) -> Iterator[Callable[[], None]]:
    started, done, ended = time.perf_counter(), 0, threading.Event()

    def advance() -> None:
        nonlocal done
        done += 1

    def write() -> None:
        while not ended.wait(_LINE_INTERVAL_S):
            elapsed = time.perf_counter() - started
            left = f", about {elapsed / done * (total - done):.0f} s left" if done else ""
            rate = output_tokens() / elapsed
            print_message(f"{done} of {total} requests, {rate:,.0f} tok/s{left}")

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield advance
    finally:
        ended.set()
        writer.join()
