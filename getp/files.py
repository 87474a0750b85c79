"""The files of a job: numbered text in, token ids out, errors beside them.

A path of `-` is standard input or standard output.
"""

import json
import os
import re
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from getp.errors import GetpError

STANDARD = "-"
_BOM = b"\xef\xbb\xbf"
_COUNT = re.compile(rb"[0-9]{1,12}")
_TOKEN_ID = re.compile(rb"[0-9]{1,10}")
_BIGGEST_ID = 2**31 - 1

TokenIds: TypeAlias = "array[int]"
"""The ids of one completion, four bytes each: a job keeps them all until it is written."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of the input. `text` is None when the line is no UTF-8."""

    line: int  # in the file, from 1
    text: str | None


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """One line of the errors file."""

    line: int  # of the input file, from 1
    index: int  # of the request, from 0
    code: str
    message: str


def read_bytes(path: str) -> bytes:
    """Return a whole file, or all of standard input for `-`. Raises GetpError."""
    try:
        return sys.stdin.buffer.read() if path == STANDARD else Path(path).read_bytes()
    except OSError as error:
        raise GetpError(f"cannot read {path}: {error.strerror}") from error


def split_lines(data: bytes) -> list[bytes]:
    r"""Split at `\n` alone and drop one `\r` before it; the last `\n` begins no line.

    str.splitlines would also split at U+2028 and friends, which prompts do contain.
    """
    lines = data.removeprefix(_BOM).split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix(b"\r") for line in lines]


def read_numbered_text(path: str) -> tuple[list[Prompt], int]:
    """Read prompts: line 1 is N, then N prompts, one a line.

    Returns them with the number of lines after the Nth, which are ignored. A line that is not
    UTF-8 spoils only its own request. Raises GetpError naming the line that is wrong or missing.
    """
    name = "standard input" if path == STANDARD else path
    lines = split_lines(read_bytes(path))
    first = lines[0].strip() if lines else b""
    if not _COUNT.fullmatch(first):
        shown = first[:40].decode("utf-8", "replace")
        raise GetpError(f"{name}, line 1: must be the number of prompts, not {shown!r}")
    count, found = int(first), len(lines) - 1
    if found < count:
        raise GetpError(
            f"{name}, line {found + 2}: missing; line 1 promises {count} prompts, "
            f"but only {found} follow"
        )
    prompts = [
        Prompt(number, _text(line)) for number, line in enumerate(lines[1 : count + 1], start=2)
    ]
    return prompts, found - count


def _text(line: bytes) -> str | None:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return None


def read_token_file(path: str) -> list[TokenIds]:
    """Read token ids, one request a line. Raises GetpError naming the line that is wrong."""
    name = "standard input" if path == STANDARD else path
    rows: list[TokenIds] = []
    for number, line in enumerate(split_lines(read_bytes(path)), start=1):
        words = line.split()
        for word in words:
            if not _TOKEN_ID.fullmatch(word) or int(word) > _BIGGEST_ID:
                shown = word[:40].decode("utf-8", "replace")
                raise GetpError(f"{name}, line {number}: {shown!r} is no token id")
        rows.append(array("i", map(int, words)))
    return rows


def write_token_file(path: str, rows: Iterable[Sequence[int]]) -> None:
    """Write token ids separated by one space, one request a line; an empty one has failed."""
    with writing(path) as file:
        for ids in rows:
            file.write(b"%s\n" % " ".join(map(str, ids)).encode())


def errors_path(output: str) -> str:
    """Return where the errors of the job that writes `output` go."""
    return f"{output}.errors.jsonl"


def write_errors(path: str, failed: Iterable[FailedRequest]) -> None:
    """Write one JSON object a line."""
    with writing(path) as file:
        for error in failed:
            file.write(json.dumps(asdict(error), ensure_ascii=False).encode() + b"\n")


def write_report(path: str, report: Mapping[str, Any]) -> None:
    """Write what a mode reports as one JSON object."""
    with writing(path) as file:
        file.write(json.dumps(report, indent=2).encode() + b"\n")


@contextmanager
def writing(path: str) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only once it is whole and on the disk.

    Standard output (`-`), pipes and devices are written to as they are. Raises GetpError.
    """
    if path == STANDARD:
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(os.path.realpath(path))  # through a link, so that the link stays
    in_place = target.exists() and not target.is_file()
    temporary = target if in_place else target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                if not in_place:
                    os.fsync(file.fileno())
            if not in_place:
                os.replace(temporary, target)
        finally:
            if not in_place:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise GetpError(f"cannot write {path}: {error.strerror}") from error


def check_writable(path: str, others: Sequence[str] = ()) -> None:
    """Raise GetpError now if `path` cannot be written later, or is one of the job's other files."""
    if path == STANDARD:
        return
    target = Path(os.path.realpath(path))
    if any(other != STANDARD and Path(os.path.realpath(other)) == target for other in others):
        raise GetpError(f"cannot write {path}: the job uses this file for something else, too")
    if target.exists() and not target.is_file() and not target.is_dir():
        return  # a pipe or a device
    probe = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise GetpError(f"cannot write {path}: {error.strerror}") from error
