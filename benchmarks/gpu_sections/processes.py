"""Sections in separate processes: how one is started, limited, and read while it runs."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_sections.sections import SECTIONS

SCRIPT = Path(__file__).resolve().parent.parent / "gpu.py"
RESULT_PREFIX = "section result: "
_POLL_S = 0.2
_STOPPED = "stopped after "


@dataclass
class Outcome:
    """What a section has found so far; `problem` is "" if it has none.

    `seconds` is None until it has ended.
    """

    name: str
    variant: str = ""  # of the kernels
    rows: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""
    seconds: float | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether the section ran out of time, which does not mean that a result is wrong."""
        return self.problem.startswith(_STOPPED)


def run_section(name: str, arguments: str) -> None:
    """Run a section in this process and print each row as soon as it is measured.

    arguments: a JSON object with the limits, and with a variant of the kernels or "".
    """
    from benchmarks.gpu_sections.measure import Limits
    from benchmarks.gpu_sections.variants import changed_kernels

    given = json.loads(arguments)
    variant, section = given.pop("variant"), SECTIONS[name]
    with changed_kernels(variant, section.operations) if variant else nullcontext():
        for row in section.run(Limits(**given)):
            print(RESULT_PREFIX + json.dumps(asdict(row)), flush=True)


def start_section(
    outcome: Outcome, limits: dict[str, float], limit_s: float, saved: Callable[[], None]
) -> None:
    """Run a section in a separate process and fill the outcome; call `saved` for each new row."""
    limits = {"copy": math.nan, "product": math.nan} | limits
    arguments = limits | {"until": time.time() + limit_s, "variant": outcome.variant}
    command = [sys.executable, str(SCRIPT), "--run", outcome.name, json.dumps(arguments)]
    end = time.monotonic() + limit_s
    # Output goes to files and the section gets its own session, because processes started by the
    # section can outlive it and would keep pipes open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=out, stderr=log, start_new_session=True)
        read = 0
        try:
            while process.poll() is None and time.monotonic() < end:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
                read = _take_rows(out, read, outcome, saved)
            status = process.poll()
            outcome.problem = f"status {status}" if status else ""
            if status is None:
                outcome.problem = f"{_STOPPED}{limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _take_rows(out, read, outcome, saved)
        log.seek(0)
        errors = log.read().strip()
    if outcome.problem:
        if not outcome.variant:
            print(errors[-3000:], file=sys.stderr)
        if errors:
            outcome.problem += f": {errors.splitlines()[-1][:1000]}"


def _take_rows(out: IO[str], read: int, outcome: Outcome, saved: Callable[[], None]) -> int:
    """Add the complete lines after `read` characters; return how many are read now."""
    # The section writes to the same open file, at the end; so its position must not be moved.
    text = os.pread(out.fileno(), 1 << 30, read)
    lines = text[: text.rfind(b"\n") + 1]
    for line in lines.decode(errors="replace").splitlines():
        if line.startswith(RESULT_PREFIX):
            outcome.rows.append(json.loads(line.removeprefix(RESULT_PREFIX)))
            saved()
    return read + len(lines)
