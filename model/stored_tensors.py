"""What the headers of safetensors files tell about tensors, without torch.

A config may leave open what only the weights can answer: their dtype, and whether a tied head is
stored apart from the embedding. Damaged files are not reported here but where they are loaded.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from model.config import CheckpointError, open_regular, read_json

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_CHUNK_BYTES = 8 << 20
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class _Location:
    """Where a tensor's values are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the file
    size: int  # bytes


class StoredTensors:
    """The tensors of a checkpoint directory."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._headers: dict[str, dict[str, Any]] = {}

    def __contains__(self, name: object) -> bool:
        """Whether a tensor is stored."""
        return isinstance(name, str) and self._find(name) is not None

    def dtype(self, name: str) -> str | None:
        """The dtype of a tensor, one of `DTYPES`; None if it is not stored or has another."""
        found = self._find(name)
        return None if found is None else _DTYPES.get(found.dtype)

    def differ(self, first: str, second: str) -> bool:
        """Whether both tensors are stored and have different values.

        Reads as far as the values are equal.
        """
        one, other = self._find(first), self._find(second)
        if one is None or other is None:
            return False
        if (one.dtype, one.shape, one.size) != (other.dtype, other.shape, other.size):
            return True
        try:
            with open_regular(one.file) as a, open_regular(other.file) as b:
                a.seek(one.start)
                b.seek(other.start)
                for done in range(0, one.size, _CHUNK_BYTES):
                    size = min(_CHUNK_BYTES, one.size - done)
                    values = a.read(size)
                    if values != b.read(size):
                        return True
                    if len(values) < size:
                        return False  # truncated
        except (CheckpointError, OSError, ValueError, OverflowError):
            return False
        return False

    def _find(self, name: str) -> _Location | None:
        file = self._file_of(name)
        if file is None:
            return None
        try:
            header = self._header(file)
            found = header[name]
            start, end = found["data_offsets"]
            first, size = header["first_byte"] + int(start), int(end) - int(start)
            return _Location(
                self._folder / file, str(found["dtype"]), tuple(found["shape"]), first, size
            )
        except (
            CheckpointError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError
        ):  # fmt: skip
            return None

    @cached_property
    def _weight_map(self) -> dict[str, Any]:
        """The file of each tensor by the index; empty without a valid one."""
        index = self._folder / "model.safetensors.index.json"
        try:
            files = read_json(index).get("weight_map") if index.is_file() else None
        except CheckpointError:
            return {}
        return files if isinstance(files, dict) else {}

    def _file_of(self, name: str) -> str | None:
        if (self._folder / "model.safetensors").is_file():
            return "model.safetensors"
        file = self._weight_map.get(name)
        is_here = isinstance(file, str) and Path(file).name == file
        return file if is_here and (self._folder / str(file)).is_file() else None

    def _header(self, file: str) -> dict[str, Any]:
        """The header of a file, and under "first_byte" where its tensors begin."""
        if file not in self._headers:
            with open_regular(self._folder / file) as opened:
                size = int.from_bytes(opened.read(8), "little")
                if size > _MAX_HEADER_BYTES:
                    raise ValueError("the header is too large")
                header = json.loads(opened.read(size))
            self._headers[file] = dict(header) | {"first_byte": 8 + size}
        return self._headers[file]
