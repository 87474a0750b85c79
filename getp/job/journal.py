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
import json
import os
import re
import threading
import zlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

from getp.errors import GetpError
from getp.files import sync_folder

_RECORD = re.compile(rb"([0-9]{1,15}) ([+-]) (.*)", re.DOTALL)

Header = dict[str, Any]

# Fingerprint keys that do not say what they are; the keys are part of the file format.
_LABELS = {
    "capped": "length limit given",
    "openai temperature": "temperature of OpenAI requests",
}


class Journal:
    """An open and locked journal. Raises GetpError if it is another job's, locked or damaged.

    `header` is written into a new journal. An existing journal keeps its own header, which must
    have the same "fingerprint"; one without any request is replaced if it has not.
    """

    def __init__(
        self, path: str, header: Header, total: int, flush_s: float = 1.0, restart: bool = False
    ) -> None:
        self.path = path
        self.done = 0  # requests in the journal
        self.failed = 0  # those of them that failed
        self.damaged = 0  # damaged records; their requests run again
        self._total = total
        self._flush_s = flush_s
        self._offsets = array("q", [-1]) * total  # of each request's record; -1: none
        self._closed, self._unsynced = threading.Event(), False
        self._sync_error: OSError | None = None
        self._file = self._open_locked(path)
        try:
            if restart:
                os.ftruncate(self._file.fileno(), 0)
            self.header = self._read_or_write_header(header)
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

    def __contains__(self, index: int) -> bool:
        return self._offsets[index] >= 0

    def append(self, index: int, ok: bool, line: bytes) -> None:
        """Save a finished request; from then on it survives a killed process. Raises GetpError."""
        if self._sync_error is not None:
            raise self._failure(self._sync_error)
        record = _with_checksum(b"%d %c %s" % (index, b"+" if ok else b"-", line))
        try:
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
            self._reader.seek(self._offsets[index])
            content = _checked_content(self._reader.readline())
        except OSError as error:
            raise self._failure(error) from error
        match = _RECORD.fullmatch(content or b"")
        if match is None or int(match[1]) != index:
            raise GetpError(
                f"{self.path}: the record of request {index} is damaged; repeat the command to run "
                "the request again"
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
        """Delete the journal; call it after the result of the job is written."""
        Path(self.path).unlink(missing_ok=True)

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

    def _read_or_write_header(self, header: Header) -> Header:
        """Read the existing journal, or begin a new one; return its header."""
        first = self._file.readline()
        self._end = len(first)
        if not first.endswith(b"\n"):  # new, or truncated while its header was written
            return self._begin(header)
        found = _header(first)
        if found is None or found.keys() != header.keys():
            raise GetpError(
                "{journal}: the first line is damaged, so the job that it belongs to is unknown; "
                "{restart} starts over",
                journal=self.path,
            )
        old, new = _comparable(found["fingerprint"]), _comparable(header["fingerprint"])
        if old != new:
            if os.fstat(self._file.fileno()).st_size == len(first):
                return self._begin(header)  # the job stopped before a request finished
            self._refuse_changes(old, new)
        self._index_records()
        return found

    def _begin(self, header: Header) -> Header:
        os.ftruncate(self._file.fileno(), 0)
        self._end = 0
        self._write(_with_checksum(json.dumps(header).encode()))
        os.fsync(self._file.fileno())
        sync_folder(Path(self.path).absolute().parent)
        return header

    def _refuse_changes(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> NoReturn:
        # A value is a field, so that braces in it stay. A name without spaces is a setting.
        fields: dict[str, str] = {}
        changes = []
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                label = _LABELS.get(name, name)
                key = name.replace(" ", "_")
                fields |= {f"old_{key}": repr(old.get(name)), f"new_{key}": repr(new.get(name))}
                setting = f"{{{name}}}" if key == label else label
                changes.append(f"{setting} {{old_{key}}}, now {{new_{key}}}")
        raise GetpError(
            f"this job was started with {'; '.join(changes)}. Repeat the original command to "
            "resume, or add {restart} to start over (journal: {journal})",
            **fields,
            journal=self.path,
        )

    def _index_records(self) -> None:
        """Find the offset of every intact record; remove a truncated one at the end."""
        for line in self._file:
            if not line.endswith(b"\n"):
                os.ftruncate(self._file.fileno(), self._end)
                return
            match = _RECORD.fullmatch(_checked_content(line) or b"")
            if match is None or (index := int(match[1])) >= self._total:
                self.damaged += 1
            else:
                self._index_record(index, self._end, match[2] == b"+")
            self._end += len(line)

    def _index_record(self, index: int, offset: int, ok: bool) -> None:
        if index in self:
            return
        self._offsets[index] = offset
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
        saved = f"; {self.done} of {self._total} requests are saved" if self.done else ""
        return GetpError(
            f"cannot use the journal {self.path}: {error.strerror}{saved}. Fix the cause (disk "
            "full: make room), then repeat the command to resume"
        )


def _comparable(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint with the keys of this version, without values that have no effect."""
    temperature = fingerprint.get("temperature")
    if fingerprint.get("input format") != "text":  # older journals have one for all requests
        return {"openai temperature": temperature, **fingerprint}
    unused = ("top_p", "top_k") if temperature == 0 else ()  # no line can set its own temperature
    return {name: value for name, value in fingerprint.items() if name not in unused}


def _header(line: bytes) -> Header | None:
    """Return the header in a first line; None if the line is damaged or is not a header."""
    try:
        found = json.loads(_checked_content(line) or b"")
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict) and isinstance(found.get("fingerprint"), dict):
        return found
    return None


def _with_checksum(content: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _checked_content(line: bytes) -> bytes | None:
    """Return the content of a line; None if it is damaged."""
    content = line[9:-1]
    return content if line == _with_checksum(content) else None
