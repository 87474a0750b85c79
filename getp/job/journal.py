"""The journal of a job: every finished request, appended at once, so that a job can be resumed.

A text file beside the output. Each line is the CRC-32 of the rest, then the rest:

    crc {"fingerprint": …}          the first line: the header, which identifies the job
    crc INDEX + LINE                a request that succeeded, with its line of the result
    crc INDEX - LINE                a request that failed, with its error as JSON

When `append` returns, the record is in the kernel's page cache and survives a killed process; a
thread calls fsync within the flush interval, so that it survives a power failure. The lock is the
kernel's (flock): it is released when the process that holds it ends, so it is never stale.
"""

import fcntl
import os
import re
import threading
from array import array
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from getp.errors import GetpError
from getp.files import MAX_LINE_BYTES, sync_folder
from getp.job.journal_header import (
    ROUNDING,
    Header,
    checked_content,
    comparable,
    header_line,
    read_header,
    refuse_changes,
    with_checksum,
)
from getp.ownership import may_start_journal, starts_journal
from getp.terminal import warn
from getp.units import counted

_RECORD = re.compile(rb"([0-9]{1,15}) ([+-]) (.*)", re.DOTALL)
_SEARCHED_BYTES = 16 << 20  # of a file without a header, in search of a record


class Journal:
    """An open and locked journal. Raises GetpError if it is another job's, locked or damaged.

    `header` is written into a new journal. An existing journal keeps its own header, which must
    have the same "fingerprint" and may have another "rounding"; one without any request is replaced
    if it differs in them.
    """

    def __init__(
        self, path: str, header: Header, indices: range, flush_s: float = 1.0, restart: bool = False
    ) -> None:
        """indices: the numbers of the job's requests."""
        self.path = path
        self.done = 0  # requests in the journal
        self.failed = 0  # those of them that failed
        self.damaged = 0  # damaged records; their requests run again
        self.indices, self.total = indices, len(indices)
        self._flush_s = flush_s
        self._offsets = array("q", [-1]) * self.total  # of each request's record; -1: none
        self._closed, self._unsynced = threading.Event(), False
        self._sync_error: OSError | None = None
        self._file = self._open_locked(path)
        try:
            self.header = self._read_or_write_header(header, restart)
            # A second file object: the buffer of the first may still hold a truncated record.
            self._reader = os.fdopen(os.dup(self._file.fileno()), "rb", 1 << 16)
        except OSError as error:
            self._file.close()
            raise self._failure(error) from error
        except BaseException:
            self._file.close()
            raise
        self._syncer = threading.Thread(target=self._sync_regularly, daemon=True)
        self._syncer.start()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def in_place(self) -> bool:
        """Whether the path still names this journal: it was not deleted or replaced."""
        try:
            same = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
            return same and os.pread(self._file.fileno(), len(self._first), 0) == self._first
        except OSError:
            return False

    def __contains__(self, index: int) -> bool:
        return self._offsets[index - self.indices.start] >= 0

    def append(self, index: int, ok: bool, line: bytes) -> None:
        """Save a finished request; from then on it survives a killed process. Raises GetpError."""
        if self._sync_error is not None:
            raise self._failure(self._sync_error)
        record = with_checksum(b"%d %c %s" % (index, b"+" if ok else b"-", line))
        try:
            if os.fstat(self._file.fileno()).st_size < self._end:
                before, lost = self.done, self._restore()
                raise GetpError(
                    f"{self.path} was truncated by another program while the job ran: {lost} of "
                    f"{before} finished requests are lost. Repeat the command to run them again"
                )
            self._write(record)
        except OSError as error:
            raise self._failure(error) from error
        self._index_record(index, self._end - len(record), ok)
        self._unsynced = True
        if not self._flush_s:
            self.sync()

    def read(self, index: int) -> tuple[bool, bytes]:
        """Return whether a finished request succeeded, and its line. Raises GetpError."""
        try:
            self._reader.seek(self._offsets[index - self.indices.start])
            content = checked_content(self._reader.readline())
        except OSError as error:
            raise self._failure(error) from error
        match = _RECORD.fullmatch(content or b"")
        if match is None or int(match[1]) != index:
            lost = self._restore()
            raise GetpError(
                f"{self.path} was changed while the job ran: the record of request {index} is "
                f"damaged, {counted(lost, 'record')} in all. Repeat the command to run these "
                "requests again"
            )
        return match[2] == b"+", match[3]

    def sync(self) -> None:
        """Write everything to the disk now. Raises GetpError."""
        self._unsynced = False
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._sync_error = error
            raise self._failure(error) from error

    def remove(self) -> None:
        """Delete the journal; call it after the result of the job is written.

        A file that another program has put in its place is kept.
        """
        if self.in_place:
            os.unlink(self.path)
        elif os.path.lexists(self.path):
            warn(f"{self.path} was replaced by another program while the job ran; it is kept")

    def close(self) -> None:
        """Write everything to the disk and release the lock."""
        if self._file.closed:
            return
        self._closed.set()
        self._syncer.join()
        try:
            if self._unsynced and self._sync_error is None:
                self.sync()
        finally:
            self._reader.close()
            self._file.close()

    def _open_locked(self, path: str) -> BinaryIO:
        while True:
            try:
                file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "rb")
            except OSError as error:
                raise self._failure(error) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The previous holder of the lock may have removed the file that was opened.
                if os.path.exists(path) and os.path.samestat(
                    os.fstat(file.fileno()), os.stat(path)
                ):
                    return file
            except BlockingIOError:
                file.close()
                raise GetpError(
                    f"another process is running this job (it has locked {path})"
                ) from None
            except OSError as error:
                file.close()
                raise self._failure(error) from error
            file.close()

    def _read_or_write_header(self, header: Header, restart: bool) -> Header:
        """Read the existing journal, or begin a new one; return its header."""
        first = self._file.readline(MAX_LINE_BYTES)
        found = read_header(first)
        if found is None and not self._is_ours(first):
            raise GetpError(
                "{journal} is not a journal, and this job would write its journal there: move that "
                "file, or choose another name for {output}",
                journal=self.path,
            )
        if restart or not first.endswith(b"\n"):  # not: new, or truncated in its header
            return self._begin(header)
        if found is None or found.keys() | {ROUNDING} != header.keys() | {ROUNDING}:
            raise GetpError(
                "{journal}: the first line is damaged, so the job that it belongs to is unknown; "
                "{restart} starts over",
                journal=self.path,
            )
        old, new = comparable(found["fingerprint"]), comparable(header["fingerprint"])
        if old != new or found.get(ROUNDING) != header.get(ROUNDING):
            if os.fstat(self._file.fileno()).st_size == len(first):
                return self._begin(header)  # the job stopped before a request finished
            refuse_changes(self.path, old, new)
        self._first, self._end = first, len(first)
        self._index_records(self._file)
        return found

    def _is_ours(self, first: bytes) -> bool:
        """Whether a file without an intact header is a journal, possibly a damaged one."""
        if starts_journal(first) or (not first.endswith(b"\n") and may_start_journal(first)):
            return True
        lines = (first + self._file.read(_SEARCHED_BYTES)).split(b"\n")
        return any(checked_content(line + b"\n") is not None for line in lines)

    def _begin(self, header: Header) -> Header:
        os.ftruncate(self._file.fileno(), 0)
        self._first, self._end = header_line(header), 0
        self._write(self._first)
        os.fsync(self._file.fileno())
        sync_folder(Path(self.path).absolute().parent)
        return header

    def _restore(self) -> int:
        """Make a journal that another program has damaged usable; return the requests lost."""
        before = self.done
        os.pwrite(self._file.fileno(), self._first, 0)
        self._end = len(self._first)
        self._offsets = array("q", [-1]) * self.total
        self.done = self.failed = self.damaged = 0
        # A new file object: the buffers of the others hold what was there before.
        with os.fdopen(os.dup(self._file.fileno()), "rb") as file:
            file.seek(self._end)
            self._index_records(file)
        return before - self.done

    def _index_records(self, file: BinaryIO) -> None:
        """Find the offset of every intact record; remove a truncated one at the end."""
        for line in file:
            if not line.endswith(b"\n"):
                os.ftruncate(self._file.fileno(), self._end)
                return
            match = _RECORD.fullmatch(checked_content(line) or b"")
            if match is None or (index := int(match[1])) not in self.indices:
                self.damaged += 1
            else:
                self._index_record(index, self._end, match[2] == b"+")
            self._end += len(line)

    def _index_record(self, index: int, offset: int, ok: bool) -> None:
        if index in self:
            return
        self._offsets[index - self.indices.start] = offset
        self.done += 1
        self.failed += not ok

    def _write(self, data: bytes) -> None:
        """Append all of the data, or nothing."""
        written = 0
        try:
            while written < len(data):
                at = self._end + written
                written += os.pwrite(self._file.fileno(), data[written:], at)
        except OSError:
            os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end += len(data)

    def _sync_regularly(self) -> None:
        while self._flush_s and not self._closed.wait(self._flush_s):
            if self._unsynced and self._sync_error is None:
                try:
                    self.sync()
                except GetpError:
                    return  # the next append raises it

    def _failure(self, error: OSError) -> GetpError:
        saved = f"; {self.done} of {self.total} requests are saved" if self.done else ""
        return GetpError(
            f"cannot use the journal {self.path}: {error.strerror}{saved}. Fix the cause (disk "
            "full: make room), then repeat the command to resume"
        )
