"""The result file of a job and its errors file, written from the journal."""

import json
import os
from itertools import count
from pathlib import Path

from getp.errors import GetpError
from getp.files import STDIO, is_stream, open_output
from getp.job.formats.interface import OutputFormat
from getp.job.journal import Journal
from getp.ownership import errors_path
from getp.terminal import discard_output, print_message


def write_results(journal: Journal, total: int, output: str, form: OutputFormat) -> bytes | None:
    """Write the result of a finished job, in input order. Raises GetpError.

    Returns the line of the first failed request as the journal has it, or None.

    The errors file is written first, so that a result file always implies a complete job. If
    standard output or a pipe fails, the result is written to a file in the working directory,
    because such a job cannot be resumed.
    """
    if not form.holds_failures:
        _write_errors(journal, total, output)
    try:
        return _write(journal, total, output, form)
    except (GetpError, OSError) as error:
        if not is_stream(output):
            raise
        if output == STDIO:
            discard_output()
        names = (f"getp-results-{os.getpid()}-{n}{form.suffix}" for n in count(1))
        fallback = next(name for name in names if not os.path.lexists(name))
        _write(journal, total, fallback, form)
        cause = f"cannot write {output}: {error.strerror}" if isinstance(error, OSError) else error
        raise GetpError(f"{cause}; the results are in {fallback} instead") from error


def _write(journal: Journal, total: int, output: str, form: OutputFormat) -> bytes | None:
    first_failure = None
    with open_output(output) as file:
        for index in range(total):
            ok, line = journal.read(index)
            if not ok and first_failure is None:
                first_failure = line
            file.write((line if ok or form.holds_failures else b"") + b"\n")
    return first_failure


def _write_errors(journal: Journal, total: int, output: str) -> None:
    if not journal.failed:
        if not is_stream(output):
            Path(errors_path(output)).unlink(missing_ok=True)  # of an earlier run
        return
    failures = (line for ok, line in map(journal.read, range(total)) if not ok)
    if is_stream(output):
        for line in failures:
            failure = json.loads(line)
            print_message(f"getp: line {failure['line']} failed: {failure['message']}")
        return
    with open_output(errors_path(output)) as file:
        for line in failures:
            file.write(line + b"\n")
