"""An input's first pass over its files, and the requests of its second.

The first pass counts and fingerprints the requests, so that an error in a file is found before any
work; the second pass reads them while the job runs. Neither holds more than one record in memory.
The first pass keeps a four-byte checksum per request, so that the second pass detects a changed
file.
"""

import hashlib
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from getp.errors import GetpError
from getp.files import is_stream, open_input, path_name
from getp.job.formats import input_format
from getp.job.formats.interface import InputFormat, Line, Rows
from getp.job.formats.table import Columns, TableFormat
from getp.job.input_files import format_of_files, input_files

_START = 4096  # bytes from which the format of a file without a known suffix is recognised


@dataclass(frozen=True)
class Part:
    """The part of an input that a job runs."""

    first: int | None = None  # only that many requests; None: all
    shard: tuple[int, int] | None = None  # one of several equal ranges of them: (number, count)

    def indices(self, found: int) -> range:
        """Return the request numbers of this part of `found` requests, of which it has `first`."""
        number, count = self.shard or (1, 1)
        return range(found * (number - 1) // count, found * number // count)


@dataclass(frozen=True)
class Source:
    """An input after the first pass."""

    name: str  # for messages
    files: Sequence[str]
    format: InputFormat
    indices: range  # the numbers of this job's requests, from 0
    ignored: int  # records after the last request
    digest: str  # hash of the decompressed records
    checksums: "array[int]"  # CRC-32 of each request
    part: Part = field(default_factory=Part)
    spool: BinaryIO | None = None  # the temporary copy of an input that can be read only once

    @property
    def total(self) -> int:
        """The number of requests."""
        return len(self.indices)

    def lines(self) -> Generator[Line, None, None]:
        """Yield the requests. Raises GetpError if a file has changed since the first pass."""
        found = 0
        is_request = self.format.is_request
        for number, data in enumerate(_records(self.format, self.files, self.spool), start=1):
            if found == self.indices.stop:
                break
            if is_request(number, data):
                if found >= self.indices.start:
                    if _checksum(data) != self.checksums[found]:
                        raise GetpError(
                            "{file}, {word} {number}: was changed while the job ran; restore the "
                            "file and repeat the command to resume, or start over with {restart}",
                            file=self.name,
                            word=self.format.record_word,
                            number=number,
                        )
                    yield Line(found, number, data)
                found += 1
        if found < self.indices.stop:
            raise GetpError(
                "{file} was shortened while the job ran; restore the file and repeat the command "
                "to resume, or start over with {restart}",
                file=self.name,
            )

    def rows(self) -> "Rows | None":
        """Return the rows of this job's requests with all their columns; None unless a table."""
        return self._rows() if isinstance(self.format, TableFormat) else None

    def _rows(self) -> Rows:
        at, indices = 0, self.indices
        for name in self.files:
            with _open_pass(name, self.spool) as file:
                for batch in self.format.batches(file, path_name(name)) or ():
                    start, stop = max(indices.start - at, 0), max(indices.stop - at, 0)
                    yield batch.slice(min(start, batch.num_rows), max(stop - start, 0))
                    at += batch.num_rows
                    if batch.num_rows and at >= indices.stop:
                        return


def scan(
    path: str,
    columns: Columns | None = None,
    part: Part | None = None,
    form: InputFormat | None = None,
) -> Source:
    """Make the first pass over an input, which may be standard input (`-`). Raises GetpError.

    columns: of a table; None: the usual ones. part: None for all. form: None: that of the files.
    The error names line 1 if the announced number of requests is not a number, or exceeds the
    number of requests that follow.
    """
    part = part or Part()
    name, files = path_name(path), input_files(path)
    spool = _copy_to_spool(path) if files == [path] and is_stream(path) else None
    form = form or _format(files, spool, columns)
    digest, records = hashlib.blake2b(digest_size=16), 0
    announced: int | None = None
    checksums = array("I")
    for data in _records(form, files, spool):
        if len(checksums) == part.first:
            break
        records += 1
        digest.update(b"\0" if data is None else data + b"\n")
        if records == 1:
            announced = form.announced_count(name, data)
        if form.is_request(records, data):
            checksums.append(_checksum(data))
    if not records and part.first != 0:
        announced = form.announced_count(name, b"")
    requests = len(checksums)
    total = requests if announced is None else announced
    if requests < total and requests != part.first:
        raise GetpError(f"{name}: line 1 says {total} prompts, but the file has only {requests}")
    total = min(total, requests)
    indices = part.indices(total)
    ignored = 0 if part.first is not None else requests - total
    return Source(name, files, form, indices, ignored, digest.hexdigest(), checksums, part, spool)


def _format(files: Sequence[str], spool: BinaryIO | None, columns: Columns | None) -> InputFormat:
    """Return the format of an input with these files, for a table with these columns."""
    with _open_pass(files[0], spool) as file:
        form = format_of_files(files, input_format(path_name(files[0]), file.read(_START)))
    if isinstance(form, TableFormat):
        return form.with_columns(columns or Columns())
    if columns is not None and columns != Columns():
        raise GetpError(
            "{column}, {id_column} and {parameter_column} name columns of a table, but {file} is "
            "not a table (Parquet, Arrow, CSV or TSV)",
            file=path_name(files[0]),
        )
    return form


def _records(
    form: InputFormat, files: Sequence[str], spool: BinaryIO | None
) -> Iterator[bytes | None]:
    """Yield the records of all files."""
    for name in files:
        with _open_pass(name, spool) as file:
            yield from form.records(file, path_name(name))


def _checksum(data: bytes | None) -> int:
    return 0 if data is None else zlib.crc32(data)


@contextmanager
def _open_pass(path: str, spool: BinaryIO | None) -> Iterator[BinaryIO]:
    """Open the input for one pass, from its beginning."""
    if spool is None:
        with open_input(path) as file:
            yield file
        return
    try:
        spool.seek(0)
        yield spool
    except OSError as error:
        raise GetpError(f"cannot read {path_name(path)}: {error.strerror or error}") from error


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
