"""Files as bytes: opened by suffix, read line by line, written whole or not at all.

A path of `-` is standard input or standard output; `.gz` and `.zst` are compressed.
"""

import gzip
import io
import json
import os
import re
import sys
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from getp.errors import GetpError
from getp.terminal import visible

STANDARD = "-"
LONGEST_LINE = 64 << 20  # bytes; what is longer is no prompt
_BOM = b"\xef\xbb\xbf"
_TOKEN_ID = re.compile(rb"[0-9]{1,10}")
_BIGGEST_ID = 2**31 - 1

TokenIds: TypeAlias = "array[int]"
"""The ids of one completion, four bytes each."""


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Open a file (or standard input) for reading, unpacked. Raises GetpError, also while read."""
    name = "standard input" if path == STANDARD else path
    try:
        with ExitStack() as stack:
            if path == STANDARD:
                yield sys.stdin.buffer
                return
            file: BinaryIO = stack.enter_context(open(path, "rb"))
            if path.endswith(".gz"):
                file = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=file)))
            elif path.endswith(".zst"):
                file = cast(BinaryIO, io.BufferedReader(_ZstdReader(file), 1 << 17))
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise GetpError(f"cannot read {name}: {_reason(error)}") from error


class _ZstdReader(io.RawIOBase):
    """Unpacks frame after frame; unlike the library's own, an end inside a frame is an error."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard  # here, so that other files can be read without it

        self._library = zstandard
        self._file = file
        self._frame: Any = None  # None between two frames
        self._packed = b""
        self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what comes next; 0 at the end."""
        while not self._unpacked:
            # Little at a time: 4 KiB can unpack to 128 MiB, but not to more.
            self._packed = self._packed or self._file.read(1 << 12)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._unpacked = self._frame.decompress(self._packed)
            except self._library.ZstdError as error:
                raise OSError(str(error)) from error
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count


def read_bytes(path: str) -> bytes:
    """Return a whole file, or all of standard input for `-`. Raises GetpError."""
    with opened(path) as file:
        return file.read()


def lines_of(file: BinaryIO) -> Iterator[bytes | None]:
    r"""Yield lines, split at `\n` alone and one `\r` before it dropped; None: too long.

    str.splitlines would also split at U+2028 and friends, which prompts do contain.
    """
    start = True
    while line := file.readline(LONGEST_LINE):
        if start:
            line, start = line.removeprefix(_BOM), False
            if not line:
                return
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_LINE)
            yield None
        else:
            yield line.removesuffix(b"\n").removesuffix(b"\r")


def split_lines(data: bytes) -> list[bytes]:
    """Return the lines of a small file, as `lines_of` yields them."""
    return [line for line in lines_of(io.BytesIO(data)) if line is not None]


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


def token_line(ids: Sequence[int]) -> bytes:
    """Return one line of a token file, without its end: ids separated by one space."""
    return " ".join(map(str, ids)).encode()


def json_line(value: object) -> bytes:
    """Return `value` as JSON on one line of UTF-8; lone surrogates stay escaped.

    Raises ValueError for NaN and infinity, which JSON cannot say.
    """
    form: dict[str, Any] = {"separators": (",", ":"), "allow_nan": False}
    try:
        return json.dumps(value, ensure_ascii=False, **form).encode()
    except UnicodeEncodeError:
        return json.dumps(value, **form).encode()


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
        with _shown(sys.stdout.buffer) as shown:
            yield shown
        sys.stdout.buffer.flush()
        return
    target = Path(os.path.realpath(path))  # through a link, so that the link stays
    temporary = target if in_place(path) else _temporary(target)
    try:
        try:
            with open(temporary, "wb") as file:
                with _packed(file, path) as packed, _shown(packed) as shown:
                    yield shown
                file.flush()
                if temporary != target:
                    os.fsync(file.fileno())
            if temporary != target:
                os.replace(temporary, target)
                sync_folder(target.parent)
        finally:
            if temporary != target:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise GetpError(f"cannot write {path}: {_reason(error)}") from error


@contextmanager
def _shown(file: BinaryIO) -> Iterator[BinaryIO]:
    """Yield the file, or if it is a terminal, what leaves out the control characters of a text."""
    if not file.isatty():
        yield file
        return
    text = io.BytesIO()
    yield text
    file.write(visible(text.getvalue().decode("utf-8", "replace")).encode())


@contextmanager
def _packed(file: BinaryIO, path: str) -> Iterator[BinaryIO]:
    if path.endswith(".gz"):
        # Neither name nor time inside: the same results are the same bytes.
        with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
            yield cast(BinaryIO, packed)
    elif path.endswith(".zst"):
        import zstandard

        with zstandard.ZstdCompressor(write_checksum=True).stream_writer(
            file, closefd=False
        ) as writer:
            yield cast(BinaryIO, writer)
    else:
        yield file


def in_place(path: str) -> bool:
    """Whether `path` is no file that could be replaced: standard output, a pipe, a device."""
    return path == STANDARD or (os.path.exists(path) and not os.path.isfile(path))


def sync_folder(folder: Path) -> None:
    """See that names made, changed or removed in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: str, others: Sequence[str] = ()) -> None:
    """Raise GetpError now if `path` cannot be written later, or is one of the job's other files."""
    if path == STANDARD:
        return
    if not path:
        raise GetpError("cannot write a file without a name")
    target = Path(os.path.realpath(path))
    if any(other != STANDARD and Path(os.path.realpath(other)) == target for other in others):
        raise GetpError(f"cannot write {path}: the job uses this file for something else, too")
    if in_place(path) and not target.is_dir():
        return
    probe = _temporary(target)
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise GetpError(f"cannot write {path}: {_reason(error)}") from error


def remove_leftovers(path: str) -> None:
    """Remove the unfinished files of processes that were killed while they wrote `path`."""
    target = Path(os.path.realpath(path))
    for file in target.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9]+\.tmp", file.name):
            file.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
