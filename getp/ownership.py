"""Recognises files that getp wrote, by their content: it deletes and replaces only such files."""

import fcntl
import json
import os
import re
import secrets
import stat
from contextlib import suppress
from itertools import count
from pathlib import Path

from getp.errors import GetpError

ERROR_KEYS = ("line", "index", "code", "message")
"""The keys of each line of an errors file, in this order."""

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")

_JOURNAL_START = b'00000000 {"fingerprint": {'
"""The start of a journal, with zeros in place of its checksum."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return _URL.match(path) is not None


def local_name(path: str) -> str:
    """Return the path beside which a job keeps its own files: of a URL, the name alone.

    Files at a URL can neither be locked nor appended to.
    """
    return os.path.basename(path.rstrip("/")) if is_remote(path) else path


def starts_journal(start: bytes) -> bool:
    """Whether a file that starts with these bytes is a journal, intact or not."""
    return len(start) >= len(_JOURNAL_START) and may_start_journal(start)


def may_start_journal(start: bytes) -> bool:
    """Whether these bytes are, or could become, the start of a journal."""
    masked = re.sub(rb"^[0-9a-f]{1,8}", lambda match: b"0" * len(match[0]), start)
    return _JOURNAL_START.startswith(masked[: len(_JOURNAL_START)])


def refuse_journal(path: str) -> None:
    """Raise GetpError if the file, which is to be replaced, is the journal of a job."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return
        with open(path, "rb") as file:
            start = file.read(len(_JOURNAL_START))
    except OSError:
        return
    if starts_journal(start):
        raise GetpError(
            f"{path} is the journal of another job, with the requests that it has finished: choose "
            "another file, or finish that job first"
        )


def errors_path(output: str) -> str:
    """Return the path of the errors file for results that do not hold failures themselves.

    OUTPUT.errors.jsonl or, if there is such a file that getp did not write, OUTPUT.errors-2.jsonl
    and so on.
    """
    output = local_name(output)
    paths = (f"{output}.errors{f'-{n}' if n > 1 else ''}.jsonl" for n in count(1))
    return next(path for path in paths if not os.path.lexists(path) or is_errors_file(path))


def is_errors_file(path: str) -> bool:
    """Whether each line of the file is a failure as getp writes it, and there is at least one."""
    found = False
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            for line in file:
                if not _is_failure(line):
                    return False
                found = True
    except OSError:
        return False
    return found


def _is_failure(line: bytes) -> bool:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and tuple(found) == ERROR_KEYS


def remove_leftovers(path: str) -> None:
    """Remove the temporary files of processes that were killed while they wrote `path`.

    A process that is still writing holds the lock of its file.
    """
    target = Path(os.path.realpath(path))
    form = re.compile(rf"\.{re.escape(target.name)}\.getp-[0-9]+-[0-9a-f]{{8}}\.tmp")
    for file in filter(lambda file: form.fullmatch(file.name), target.parent.iterdir()):
        with suppress(OSError), open(file, "rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()


def temporary_path(target: Path) -> Path:
    """Return the path of a new file; the name says that it is getp's, which may delete it."""
    return target.with_name(f".{target.name}.getp-{os.getpid()}-{secrets.token_hex(4)}.tmp")
