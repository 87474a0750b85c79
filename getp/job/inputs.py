"""The input of a job: what kind it is, how many requests it holds, and its lines one by one.

A first pass counts and fingerprints the file, so that a mistake in it is found before any work;
the second reads it as the work goes on. Neither holds more than one line; of each request four
bytes are kept, by which the second pass sees that it is still what it was.
"""

import hashlib
import os
import re
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Literal, cast

from getp.errors import GetpError
from getp.files import STANDARD, lines_of, opened

_COUNT = re.compile(rb"[0-9]{1,12}")

Kind = Literal["text", "jsonl"]


@dataclass(frozen=True, slots=True)
class Line:
    """One request as it stands in the input. `data` is None when the line is too long."""

    index: int  # of the request, from 0
    number: int  # of the line, from 1
    data: bytes | None


@dataclass(frozen=True)
class Source:
    """An input file after the first pass."""

    path: str
    name: str  # for messages
    kind: Kind
    total: int  # requests
    ignored: int  # lines after the last request
    digest: str  # of the unpacked bytes
    checks: "array[int]"  # CRC-32 of each request, which is never run if it is another by then
    spool: BinaryIO | None = None  # the temporary copy of what can be read only once

    def lines(self) -> Generator[Line, None, None]:
        """Yield the requests. Raises GetpError when the file is no longer what it was."""
        found = 0
        with _opened(self.path, self.spool) as file:
            for number, data in enumerate(lines_of(file), start=1):
                if found == self.total:
                    break
                if _is_request(self.kind, number, data):
                    if _check(data) != self.checks[found]:
                        raise GetpError(
                            f"{self.name}, line {number}: was changed while the job ran; put the "
                            "file back as it was to go on, or start over with --restart"
                        )
                    yield Line(found, number, data)
                    found += 1
        if found < self.total:
            raise GetpError(f"{self.name} was changed while it was read")


def scan(path: str) -> Source:
    """Make the first pass over a file, or over standard input (`-`). Raises GetpError.

    `*.jsonl` is JSONL and `*.txt` numbered text; anything else is told by its first character.
    Numbered text is refused, naming the line, when its first line is no number or promises more
    prompts than follow.
    """
    name = "standard input" if path == STANDARD else path
    once = path == STANDARD or (os.path.exists(path) and not os.path.isfile(path))
    spool = _spool(path) if once else None
    digest, lines, requests = hashlib.blake2b(digest_size=16), 0, 0
    kind, promised, checks = _kind_by_name(name), 0, array("I")
    with _opened(path, spool) as file:
        for data in lines_of(file):
            lines += 1
            digest.update(b"\0" if data is None else data + b"\n")
            if kind is None:
                kind = "jsonl" if (data or b"").lstrip().startswith(b"{") else "text"
            if kind == "text" and lines == 1:
                promised = _promised(name, data)
            if _is_request(kind or "text", lines, data):
                requests += 1
                checks.append(_check(data))
    if kind == "jsonl":
        return Source(path, name, kind, requests, 0, digest.hexdigest(), checks, spool)
    if not lines:
        _promised(name, b"")
    if requests < promised:
        raise GetpError(
            f"{name}, line {requests + 2}: missing; line 1 promises {promised} prompts, "
            f"but only {requests} follow"
        )
    ignored = requests - promised
    return Source(path, name, "text", promised, ignored, digest.hexdigest(), checks, spool)


def plain_name(path: str) -> str:
    """Return a path without the suffix that says how it is packed."""
    return path.removesuffix(".gz").removesuffix(".zst")


def _kind_by_name(name: str) -> Kind | None:
    plain = plain_name(name)
    if plain.endswith(".jsonl"):
        return "jsonl"
    return "text" if plain.endswith(".txt") else None


def _is_request(kind: Kind, number: int, data: bytes | None) -> bool:
    """Whether a line is a request: each but the first of numbered text, each but blank JSONL."""
    if kind == "text":
        return number > 1
    return data is None or bool(data.strip())


def _check(data: bytes | None) -> int:
    return 0 if data is None else zlib.crc32(data)


def _promised(name: str, data: bytes | None) -> int:
    first = (data or b"").strip()
    if not _COUNT.fullmatch(first):
        shown = first[:40].decode("utf-8", "replace")
        raise GetpError(f"{name}, line 1: must be the number of prompts, not {shown!r}")
    return int(first)


@contextmanager
def _opened(path: str, spool: BinaryIO | None) -> Iterator[BinaryIO]:
    """Open the input for one pass, which begins where it begins."""
    if spool is None:
        with opened(path) as file:
            yield file
        return
    spool.seek(0)
    yield spool


def _spool(path: str) -> BinaryIO:
    """Copy a stream to a file that has no name, so that no end of the process can leave it."""
    try:
        spool = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - lives on
        with opened(path) as file:
            shutil.copyfileobj(file, spool)
        spool.flush()
    except OSError as error:
        raise GetpError(f"cannot keep a copy of {path}: {error.strerror}") from error
    return spool
