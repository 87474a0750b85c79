"""The input of a job: its format, its number of requests, and the requests one by one.

The first pass counts and fingerprints the file, so that an error in it is found before any work;
the second pass reads it while the job runs. Neither holds more than one line in memory. The first
pass keeps a four-byte checksum per request, so that the second pass detects a changed file.
"""

import hashlib
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

from getp.errors import GetpError
from getp.files import is_stream, open_input, path_name
from getp.job.formats import input_format
from getp.job.formats.interface import InputFormat, Line

_START = 4096  # bytes from which the format of a file without a known suffix is recognised


@dataclass(frozen=True)
class Source:
    """An input file after the first pass."""

    path: str
    name: str  # for messages
    format: InputFormat
    total: int  # requests
    ignored: int  # records after the last request
    digest: str  # hash of the decompressed lines
    checksums: "array[int]"  # CRC-32 of each request
    spool: BinaryIO | None = None  # the temporary copy of an input that can be read only once

    def lines(self) -> Generator[Line, None, None]:
        """Yield the requests. Raises GetpError if the file has changed since the first pass."""
        found = 0
        is_request = self.format.is_request
        with _open_pass(self.path, self.spool) as file:
            for number, data in enumerate(self.format.records(file), start=1):
                if found == self.total:
                    break
                if is_request(number, data):
                    if _checksum(data) != self.checksums[found]:
                        raise GetpError(
                            "{file}, line {number}: was changed while the job ran; restore the "
                            "file and repeat the command to resume, or start over with {restart}",
                            file=self.name,
                            number=number,
                        )
                    yield Line(found, number, data)
                    found += 1
        if found < self.total:
            raise GetpError(
                "{file} was shortened while the job ran; restore the file and repeat the command "
                "to resume, or start over with {restart}",
                file=self.name,
            )


def scan(path: str) -> Source:
    """Make the first pass over a file, or over standard input (`-`). Raises GetpError.

    The error names line 1 if the announced number of requests is not a number, or exceeds the
    number of requests that follow.
    """
    name = path_name(path)
    spool = _copy_to_spool(path) if is_stream(path) else None
    with _open_pass(path, spool) as file:
        found = input_format(name, file.read(_START))
    digest, records, requests = hashlib.blake2b(digest_size=16), 0, 0
    announced: int | None = None
    checksums = array("I")
    with _open_pass(path, spool) as file:
        for data in found.records(file):
            records += 1
            digest.update(b"\0" if data is None else data + b"\n")
            if records == 1:
                announced = found.announced_count(name, data)
            if found.is_request(records, data):
                requests += 1
                checksums.append(_checksum(data))
    if not records:
        announced = found.announced_count(name, b"")
    total = requests if announced is None else announced
    if requests < total:
        raise GetpError(f"{name}: line 1 says {total} prompts, but the file has only {requests}")
    return Source(path, name, found, total, requests - total, digest.hexdigest(), checksums, spool)


def _checksum(data: bytes | None) -> int:
    return 0 if data is None else zlib.crc32(data)


@contextmanager
def _open_pass(path: str, spool: BinaryIO | None) -> Iterator[BinaryIO]:
    """Open the input for one pass, from its beginning."""
    if spool is None:
        with open_input(path) as file:
            yield file
        return
    spool.seek(0)
    yield spool


def _copy_to_spool(path: str) -> BinaryIO:
    """Copy a stream to an unnamed temporary file, which the kernel removes if the process dies."""
    try:
        spool = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - it is used later
        with open_input(path) as file:
            shutil.copyfileobj(file, spool)
        spool.flush()
    except OSError as error:
        raise GetpError(f"cannot keep a copy of {path}: {error.strerror}") from error
    return spool
