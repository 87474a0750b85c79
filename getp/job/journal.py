"""The journal of a job: every finished request, appended at once, found again after any death.

A text file beside the output. Each line is the CRC-32 of the rest, then the rest:

    crc {"fingerprint": …}          the first line: which job this is
    crc INDEX + LINE                a request that succeeded, and its line of the result
    crc INDEX - LINE                one that failed, and its error as JSON

A record is in the kernel's hands when `append` returns, so it survives the process; a thread
brings it to the disk within the flush interval, so that it survives the machine. The lock is the
kernel's (flock): it dies with its holder and can never be stale.
"""

import fcntl
import json
import os
import re
import threading
import zlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from getp.errors import GetpError
from getp.files import sync_folder

_RECORD = re.compile(rb"([0-9]{1,15}) ([+-]) (.*)", re.DOTALL)

Header = dict[str, Any]


class Journal:
    """An open and locked journal. Raises GetpError when it is another job's, locked or broken.

    `header` is written into a new journal; an old one keeps its own, and its "fingerprint" must
    say what the new one says for each of its names.
    """

    def __init__(
        self, path: str, header: Header, total: int, flush_s: float = 1.0, restart: bool = False
    ) -> None:
        self.path = path
        self.done = 0  # requests that are in the journal
        self.failed = 0  # of those, failed
        self.damaged = 0  # records that were found broken; their requests run again
        self._total = total
        self._flush_s = flush_s
        self._offsets = array("q", [-1]) * total  # where a request's record begins; -1: it has none
        self._closed, self._unsynced = threading.Event(), False
        self._trouble: OSError | None = None
        self._file = self._locked(path)
        try:
            if restart:
                os.ftruncate(self._file.fileno(), 0)
            self.header = self._open(header)
            # Apart from the one above, whose buffer may still hold a torn tail.
            self._reader = os.fdopen(os.dup(self._file.fileno()), "rb", 1 << 16)
        except OSError as error:
            self._file.close()
            raise self._failure(error) from error
        except BaseException:
            self._file.close()
            raise
        self._syncer = threading.Thread(target=self._sync_now_and_then, daemon=True)
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

    def __contains__(self, index: int) -> bool:
        return self._offsets[index] >= 0

    def append(self, index: int, ok: bool, line: bytes) -> None:
        """Keep a finished request. When this returns, a killed process loses nothing of it."""
        if self._trouble is not None:
            raise self._failure(self._trouble)
        record = _framed(b"%d %c %s" % (index, b"+" if ok else b"-", line))
        try:
            self._write(record)
        except OSError as error:
            raise self._failure(error) from error
        self._note(index, self._end - len(record), ok)
        self._unsynced = True
        if not self._flush_s:
            self.sync()

    def read(self, index: int) -> tuple[bool, bytes]:
        """Return whether a finished request succeeded, and its line."""
        try:
            self._reader.seek(self._offsets[index])
            content = _content(self._reader.readline())
        except OSError as error:
            raise self._failure(error) from error
        match = _RECORD.fullmatch(content or b"")
        if match is None or int(match[1]) != index:
            raise GetpError(
                f"{self.path}: the record of request {index} is damaged; the same command runs "
                "the request again"
            )
        return match[2] == b"+", match[3]

    def sync(self) -> None:
        """Bring everything to the disk now."""
        self._unsynced = False
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._trouble = error
            raise self._failure(error) from error

    def remove(self) -> None:
        """Delete the journal of a job whose result is written."""
        Path(self.path).unlink(missing_ok=True)

    def close(self) -> None:
        """Bring everything to the disk and give the lock back."""
        if self._file.closed:
            return
        self._closed.set()
        self._syncer.join()
        try:
            if self._unsynced and self._trouble is None:
                self.sync()
        finally:
            self._reader.close()
            self._file.close()

    def _locked(self, path: str) -> BinaryIO:
        while True:
            try:
                file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "rb")
            except OSError as error:
                raise self._failure(error) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one who held the lock before may have removed what we opened.
                if os.path.exists(path) and os.path.samestat(
                    os.fstat(file.fileno()), os.stat(path)
                ):
                    return file
            except BlockingIOError:
                file.close()
                raise GetpError(
                    f"another process is at work on this job: it holds {path}"
                ) from None
            except OSError as error:
                file.close()
                raise self._failure(error) from error
            file.close()

    def _open(self, header: Header) -> Header:
        """Read what is there, or begin; return the header that counts."""
        first = self._file.readline()
        self._end = len(first)
        if not first.endswith(b"\n"):  # empty, or torn before it was ever used
            os.ftruncate(self._file.fileno(), 0)
            self._end = 0
            self._write(_framed(json.dumps(header).encode()))
            os.fsync(self._file.fileno())
            sync_folder(Path(self.path).absolute().parent)
            return header
        found = _header(first)
        if found is None or found.keys() != header.keys():
            raise GetpError(
                f"{self.path}: the first line is damaged, so nothing tells which job this is the "
                "journal of; --restart starts over"
            )
        self._compare(found["fingerprint"], header["fingerprint"])
        self._scan()
        return found

    def _compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        changed = [
            f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
            for name in dict.fromkeys([*old, *new])
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise GetpError(
                f"{self.path} is the journal of another job: {'; '.join(changed)}. Give the "
                "command as it was to go on, or --restart to start over"
            )

    def _scan(self) -> None:
        """Find every good record; cut off a torn tail."""
        for line in self._file:
            if not line.endswith(b"\n"):
                os.ftruncate(self._file.fileno(), self._end)
                return
            match = _RECORD.fullmatch(_content(line) or b"")
            if match is None or (index := int(match[1])) >= self._total:
                self.damaged += 1
            else:
                self._note(index, self._end, match[2] == b"+")
            self._end += len(line)

    def _note(self, index: int, offset: int, ok: bool) -> None:
        if index in self:
            return
        self._offsets[index] = offset
        self.done += 1
        self.failed += not ok

    def _write(self, data: bytes) -> None:
        """Append, all or nothing."""
        written = 0
        try:
            while written < len(data):
                at = self._end + written
                written += os.pwrite(self._file.fileno(), data[written:], at)
        except OSError:
            os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end += len(data)

    def _sync_now_and_then(self) -> None:
        while self._flush_s and not self._closed.wait(self._flush_s):
            if self._unsynced and self._trouble is None:
                try:
                    self.sync()
                except GetpError:
                    return  # the next append says it

    def _failure(self, error: OSError) -> GetpError:
        safe = f"; {self.done} of {self._total} requests are safe" if self.done else ""
        return GetpError(
            f"cannot use the journal {self.path}: {error.strerror}{safe}. When that is put right "
            "(disk full: make room), the same command goes on"
        )


def _header(line: bytes) -> Header | None:
    """Return what a first line says of its job; None if it is damaged, or no journal's."""
    try:
        found = json.loads(_content(line) or b"")
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict) and isinstance(found.get("fingerprint"), dict):
        return found
    return None


def _framed(content: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _content(line: bytes) -> bytes | None:
    """Return what a line holds, None if it is damaged."""
    content = line[9:-1]
    return content if line == _framed(content) else None
