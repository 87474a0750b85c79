"""Files as bytes: opened by suffix, read line by line, written completely or not at all.

The path `-` is standard input or standard output, and a path may be a URL; `.gz` and `.zst` files
are compressed.
"""

import fcntl
import gzip
import io
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from getp.errors import GetpError
from getp.ownership import is_remote, refuse_journal, temporary_path
from getp.standard_streams import refuse_closed_output
from getp.terminal import strip_control_characters

STDIO = "-"  # the path of standard input and standard output
MAX_LINE_BYTES = 64 << 20  # a longer line is not a prompt
UTF8_BOM = b"\xef\xbb\xbf"


def path_name(path: str) -> str:
    """Return the name of an input for messages: the path, or "standard input" for `-`."""
    return "standard input" if path == STDIO else path


@contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """Open a file (or standard input) for reading, decompressed.

    Raises GetpError, also for errors while the file is read.
    """
    try:
        with ExitStack() as stack:
            if path == STDIO:
                yield sys.stdin.buffer
                return
            file: BinaryIO
            if is_remote(path):
                file = stack.enter_context(open_remote(path))
            else:
                file = stack.enter_context(open(path, "rb"))
            if path.endswith(".gz"):
                file = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=file)))
            elif path.endswith(".zst"):
                file = cast(BinaryIO, io.BufferedReader(_ZstdReader(file), 1 << 17))
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise GetpError(f"cannot read {path_name(path)}: {_reason(error)}") from error


class _ZstdReader(io.RawIOBase):
    """Decompresses a series of frames; unlike the library's reader, it rejects truncated ones."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard  # imported lazily: only .zst files need the library

        self._library = zstandard
        self._file = file
        self._frame: Any = None  # None between two frames
        self._compressed = b""
        self._data = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next bytes; return how many, 0 at the end."""
        while not self._data:
            # In small pieces: 4 KiB can decompress to 128 MiB, but not to more.
            self._compressed = self._compressed or self._file.read(1 << 12)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file is truncated: it ends inside a zstd frame")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._data = self._frame.decompress(self._compressed)
            except self._library.ZstdError as error:
                raise OSError(str(error)) from error
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._data))
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count


def read_bytes(path: str) -> bytes:
    """Return a whole file, or all of standard input for `-`. Raises GetpError."""
    with open_input(path) as file:
        return file.read()


def iter_lines(file: BinaryIO) -> Iterator[bytes | None]:
    r"""Yield lines without their `\n` or `\r\n`; None stands for a line that is too long.

    str.splitlines would also split at U+2028 and similar characters, which occur in prompts.
    """
    start = True
    while line := file.readline(MAX_LINE_BYTES):
        if start:
            line, start = line.removeprefix(UTF8_BOM), False
            if not line:
                return
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield None
        else:
            yield line.removesuffix(b"\n").removesuffix(b"\r")


def split_lines(data: bytes) -> list[bytes]:
    """Return the lines of a small file, as `iter_lines` yields them."""
    return [line for line in iter_lines(io.BytesIO(data)) if line is not None]


def token_line(ids: Sequence[int]) -> bytes:
    """Return one line of a token file, without newline: ids separated by one space."""
    return " ".join(map(str, ids)).encode()


def json_line(value: object) -> bytes:
    """Return `value` as JSON on one line of UTF-8; lone surrogates stay escaped.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    form: dict[str, Any] = {"separators": (",", ":"), "allow_nan": False}
    try:
        return json.dumps(value, ensure_ascii=False, **form).encode()
    except UnicodeEncodeError:
        return json.dumps(value, **form).encode()


def write_report(path: str, report: Mapping[str, Any]) -> None:
    """Write a report as one indented JSON object, to a file or standard output (`-`)."""
    with open_output(path) as file:
        file.write(json.dumps(report, indent=2).encode() + b"\n")


@contextmanager
def open_output(path: str) -> Iterator[BinaryIO]:
    """Open a file for writing; it gets its name only once it is complete and on the disk.

    Standard output (`-`), pipes and devices are written to directly. Raises GetpError.
    """
    if path == STDIO:
        sys.stdout.flush()
        with _sanitize_for_terminal(sys.stdout.buffer) as sanitized:
            yield sanitized
        sys.stdout.buffer.flush()
        return
    if is_remote(path):
        # A copy, since a file system may keep what was written before an error.
        with tempfile.TemporaryFile() as copy:
            with _open_compressor(cast(BinaryIO, copy), path) as compressed:
                yield compressed
            copy.seek(0)
            with open_remote(path, "wb") as file:
                shutil.copyfileobj(copy, file)
        return
    target = Path(os.path.realpath(path))  # a symbolic link is followed, not replaced
    temporary = target if is_stream(path) else temporary_path(target)
    try:
        try:
            with open(temporary, "wb") as file:
                with suppress(OSError):  # some file systems have no locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with (
                    _open_compressor(file, path) as compressed,
                    _sanitize_for_terminal(compressed) as sanitized,
                ):
                    yield sanitized
                file.flush()
                if temporary != target:
                    os.fsync(file.fileno())
            if temporary != target:
                refuse_journal(str(target))
                os.replace(temporary, target)
                sync_folder(target.parent)
        finally:
            if temporary != target:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise GetpError(f"cannot write {path}: {_cause_of_failed_write(error, path)}") from error


@contextmanager
def _sanitize_for_terminal(file: BinaryIO) -> Iterator[BinaryIO]:
    """Yield the file; for a terminal, a buffer whose control characters are removed at the end."""
    if not file.isatty():
        yield file
        return
    text = io.BytesIO()
    yield text
    file.write(strip_control_characters(text.getvalue().decode("utf-8", "replace")).encode())


@contextmanager
def _open_compressor(file: BinaryIO, path: str) -> Iterator[BinaryIO]:
    if path.endswith(".gz"):
        # No name or time in the header, so that equal results give identical bytes.
        with gzip.GzipFile("", "wb", 6, file, mtime=0) as compressor:
            yield cast(BinaryIO, compressor)
    elif path.endswith(".zst"):
        import zstandard

        with zstandard.ZstdCompressor(write_checksum=True).stream_writer(
            file, closefd=False
        ) as writer:
            yield cast(BinaryIO, writer)
    else:
        yield file


def is_stream(path: str) -> bool:
    """Whether `path` is standard input or output, a pipe or a device: not a regular file.

    A stream can be read only once and cannot be replaced atomically.
    """
    return path == STDIO or (os.path.exists(path) and not os.path.isfile(path))


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, so that renamed and new files survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(
    path: str, role: str, others: Mapping[str, str] | None = None, is_journal: bool = False
) -> None:
    """Raise GetpError if `path` cannot be written, is one of the other files, or is a journal.

    role: what the file is, for the message; others: paths of other files, by role; is_journal:
    whether the path is for a journal.
    """
    if path == STDIO:
        return refuse_closed_output()
    if is_remote(path):
        return check_remote(path)
    if not path:
        raise GetpError(f"the name of the {role} file must not be empty")
    target = Path(os.path.realpath(path))
    for other_role, other in (others or {}).items():
        if other != STDIO and Path(os.path.realpath(other)) == target:
            raise GetpError(f"{role} and {other_role} are the same file: {path}")
    if is_stream(path) and not target.is_dir():
        return
    if not is_journal:
        refuse_journal(path)
    probe = temporary_path(target)
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise GetpError(f"cannot write {path}: {_cause_of_failed_write(error, path)}") from error


def _cause_of_failed_write(error: OSError, path: str) -> str:
    folder = Path(path).parent
    is_missing = isinstance(error, FileNotFoundError) and not folder.exists()
    return f"the directory {folder} does not exist" if is_missing else _reason(error)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def remote_files(url: str) -> list[str]:
    """Return the URL itself or, for a pattern or a directory, the sorted URLs of its files."""
    with _reported(url):
        system, path = _file_system(url)
        if any(character in path for character in "*?["):
            found = system.glob(path)
        elif system.isdir(path):
            found = system.find(path)
        else:
            return [url]
        return sorted(str(system.unstrip_protocol(name)) for name in found)


@contextmanager
def open_remote(url: str, mode: str = "rb") -> Iterator[BinaryIO]:
    """Open a URL. Raises GetpError, also for errors while it is read or written."""
    with _reported(url, "write" if "w" in mode else "read"):
        system, path = _file_system(url)
        with system.open(path, mode) as file:
            yield cast(BinaryIO, file)


def check_remote(url: str) -> None:
    """Raise GetpError if the file system of a URL is not usable."""
    with _reported(url, "write"):
        _file_system(url)


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise GetpError(f"{url} needs the package fsspec: pip install fsspec") from None
    found: tuple[Any, str] = url_to_fs(url)
    return found


@contextmanager
def _reported(url: str, verb: str = "read") -> Iterator[None]:
    """Turn the errors of a file system, which are of many kinds, into GetpError."""
    try:
        yield
    except (GetpError, GeneratorExit):
        raise
    except ImportError as error:  # its message names the package to install
        raise GetpError(f"cannot {verb} {url}: {error}") from error
    except Exception as error:
        # The exceptions of remote file systems have no common class but Exception.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError):  # its text may be the path alone
            reason = "no such file"
        raise GetpError(f"cannot {verb} {url}: {reason}") from error
