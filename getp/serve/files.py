"""The files of clients: inputs of batches and their results, each with a description beside it."""

import hashlib
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from getp.files import open_output
from getp.serve import config
from getp.serve.errors import ApiError, not_found
from getp.terminal import warn

_ID = re.compile(r"file-[0-9a-f]{24}")


def new_key() -> str:
    """Return 24 hexadecimal digits that cannot be guessed; later ones are greater."""
    return f"{time.time_ns() // 10**6:012x}{secrets.token_hex(6)}"


@dataclass(frozen=True)
class StoredFile:
    """What clients learn of a file."""

    id: str
    bytes: int
    created_at: int
    filename: str  # as the client calls it; it is not a path
    purpose: str

    def as_json(self) -> dict[str, Any]:
        """Return the file as OpenAI's object."""
        return {**asdict(self), "object": "file", "status": "processed", "expires_at": None}


class FileStore:
    """The files in a folder. Their names there are made here, never taken from a client."""

    def __init__(self, folder: Path) -> None:
        """Find the files of earlier servers. Raises OSError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self._lock = folder, threading.Lock()
        self._files: dict[str, StoredFile] = {}
        for path in sorted(folder.glob("file-*.json")):
            try:
                found = StoredFile(**json.loads(path.read_bytes()))
            except (ValueError, TypeError, OSError) as error:
                warn(f"{path} does not describe a file: {error}; it is ignored")
                continue
            if _ID.fullmatch(found.id) and self.path(found.id).is_file():
                self._files[found.id] = found
        for content in folder.glob("file-*.jsonl"):
            if content.stem not in self._files:
                content.unlink()  # its upload was interrupted

    def path(self, file_id: str) -> Path:
        """Return where the content of one of these files is."""
        return self._folder / f"{file_id}.jsonl"

    def add(
        self, filename: str, purpose: str, write: Callable[[BinaryIO], object], name: str = ""
    ) -> StoredFile:
        """Store a new file, whose content `write` writes. Raises ApiError, GetpError.

        name: one that is derived from something else, and replaces an earlier file; "": a new one.
        """
        if len(self._files) >= config.MAX_FILES:
            raise ApiError(
                429, f"there are {config.MAX_FILES} files: delete some", "too_many_files"
            )
        key = hashlib.blake2b(name.encode(), digest_size=12).hexdigest() if name else new_key()
        file_id = f"file-{key}"
        path = self.path(file_id)
        with open_output(str(path)) as file:
            write(file)
        found = StoredFile(file_id, path.stat().st_size, int(time.time()), filename, purpose)
        with open_output(str(self._description(file_id))) as file:
            file.write(json.dumps(asdict(found)).encode())
        with self._lock:
            self._files[file_id] = found
        return found

    def get(self, file_id: str) -> StoredFile:
        """Return a file. Raises ApiError if there is none with this id."""
        found = self._files.get(file_id)
        if found is None:
            raise not_found("file", file_id)
        return found

    def name(self, file_id: str) -> str:
        """Return what the client calls a file; "" for one that was deleted."""
        found = self._files.get(file_id)
        return "" if found is None else found.filename

    def all(self) -> list[StoredFile]:
        """Return all files, the newest first."""
        with self._lock:
            files = list(self._files.values())
        return sorted(files, key=lambda each: (each.created_at, each.id), reverse=True)

    def delete(self, file_id: str) -> None:
        """Delete a file. Raises ApiError if there is none with this id."""
        self.get(file_id)
        with self._lock:
            self._files.pop(file_id, None)
        self._description(file_id).unlink(missing_ok=True)
        self.path(file_id).unlink(missing_ok=True)

    def _description(self, file_id: str) -> Path:
        return self._folder / f"{file_id}.json"
