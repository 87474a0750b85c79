"""Runs tasks in child processes: one that crashes or hangs is a finding, and the rest still run."""

import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from getp.analysis.doctor import reports
from getp.analysis.doctor.reports import Ended, Failed, Report, Request, Started

TASK_LIMIT_S = 300.0
"""A task takes seconds, most of them to compile kernels; one that hangs never ends."""
MAX_CRASHES = 5
"""After so many in one series of tasks the others are not run: every restart takes seconds."""
_KEPT_LINES = 20  # of a child's messages, for the cause of a crash
_ROOT = str(Path(__file__).resolve().parents[3])


def child_command() -> list[str]:
    """Return the command of a child, without the request."""
    # From the folder of this getp: a model.py in the current folder must not hide its package.
    program = (
        f"import sys; sys.path.insert(0, {_ROOT!r}); from getp.analysis.doctor.child import main"
    )
    return [sys.executable, "-c", f"{program}; main()"]


def run_tasks(request: Request) -> Iterator[Report]:
    """Run all tasks of a request: yields every report, also of tasks that crashed or hung."""
    for _ in range(MAX_CRASHES + 1):
        running: Started | None = None
        last = request.first - 1
        with _Child(request) as child:
            for report in child.reports():
                if isinstance(report, Ended):
                    return
                if isinstance(report, Started):
                    running, last = report, report.number
                else:
                    running = None
                yield report
            if running is None and last < request.first:
                yield Failed("start of a child process", child.cause())
                return
            if running is not None:
                yield Failed(running.name, child.cause(), running.model)
        request = replace(request, first=last + 1)
    yield Failed("remaining checks", f"not run, because {MAX_CRASHES + 1} processes have crashed")


class _Child:
    """A running child process, which is killed if it hangs or is left."""

    def __init__(self, request: Request) -> None:
        self._process = subprocess.Popen(
            [*child_command(), request.write()],
            stdin=subprocess.PIPE,  # closed when this process ends, and the child then ends, too
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # a pipe of its own could fill up
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process, which then kills the child
        )
        self._messages: deque[str] = deque(maxlen=_KEPT_LINES)
        self._has_hung = False

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()

    def reports(self) -> Iterator[Report]:
        """Yield the reports until the process ends, or has reported nothing for TASK_LIMIT_S."""
        assert self._process.stdout is not None
        while True:
            timer = threading.Timer(TASK_LIMIT_S, self._kill_hung)
            timer.daemon = True
            timer.start()
            try:
                line = self._process.stdout.readline()
            finally:
                timer.cancel()
            if not line:
                return
            report = reports.read(line)
            if report is not None:
                yield report
            elif line.strip():
                self._messages.append(line.strip())

    def _kill_hung(self) -> None:
        self._has_hung = True
        self._process.kill()

    def cause(self) -> str:
        """Return why the process ended early: waits until it has."""
        status = self._process.wait()
        if self._has_hung:
            return f"nothing happened for {TASK_LIMIT_S:.0f} s, so the process was ended"
        if status < 0:
            name = signal.strsignal(-status) or "unknown signal"
            return f"the process crashed: {name} ({signal.Signals(-status).name})"
        message = self._messages[-1] if self._messages else "no message"
        return f"the process ended with status {status}: {message}"
