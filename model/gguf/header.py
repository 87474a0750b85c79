"""What is in a GGUF file: metadata, and where its tensors are.

The file comes from an unknown author. Every count and offset is checked against the size of the
file before anything is read or allocated, so that reading takes memory in proportion to the header.
"""

import os
import re
import struct
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from model.config import CheckpointError, open_regular
from model.gguf.tensor_types import TENSOR_TYPES, TensorType, type_name

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER = 256 << 20  # bytes; the largest tokenizers take 20 MB
_MAX_STRINGS = 4 << 20  # in arrays: the largest vocabulary and its merges are under a million
_MAX_KEYS, _MAX_TENSORS, _MAX_PARTS = 1 << 16, 1 << 20, 1000
_MAX_VALUES = 1 << 48  # of one tensor
_CHUNK = 4 << 20
_STRING, _ARRAY, _BOOL = 8, 9, 7
# The typecodes of scalars, by GGUF's numbers of value types; bool is read as a byte.
_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIifBQqd", strict=True))
_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is, and how it is stored."""

    file: Path
    start: int  # byte in the file
    type: TensorType
    shape: tuple[int, ...]  # [outputs, inputs] or [experts, outputs, inputs]

    @property
    def row_bytes(self) -> int:
        """Bytes of the values along the last dimension."""
        return self.shape[-1] // self.type.values * self.type.bytes


@dataclass(frozen=True)
class Gguf:
    """The headers of a model's files."""

    path: Path  # as given
    files: tuple[Path, ...]
    metadata: Mapping[str, Any]  # arrays of numbers are `array`s, arrays of strings lists
    tensors: Mapping[str, GgufTensor]

    def fail(self, problem: str) -> CheckpointError:
        """The error to raise for a problem with these files."""
        return CheckpointError(f"{self.path}: {problem}")

    def floats(self, name: str) -> list[float]:
        """The values of a small F32 tensor. Raises CheckpointError."""
        tensor = self.tensors[name]
        if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.row_bytes > _CHUNK:
            raise self.fail(f"tensor {name!r} must be a short list of F32 values")
        with open_regular(tensor.file) as file:
            file.seek(tensor.start)
            return list(_numbers("f", file.read(tensor.row_bytes)))


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file: by its name, or by its first bytes, as ollama has no names."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    try:
        with open_regular(path) as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (CheckpointError, OSError):
        return False


def read_gguf(path: Path) -> Gguf:
    """The headers of a model in one file, or in several of which any one is given.

    Raises CheckpointError for files that are missing, damaged, truncated or of an unknown kind.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return _read_gguf(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)  # config, tokenizer and weights are read one after the other
def _read_gguf(path: Path, size: int, changed: int) -> Gguf:
    metadata, tensors = _read_file(path)
    count = metadata.get("split.count", 1)
    if count == 1:
        return Gguf(path, (path,), metadata, tensors)
    if not isinstance(count, int) or not 0 < count <= _MAX_PARTS:
        raise CheckpointError(f"{path}: is damaged: 'split.count' is {count!r:.60}")
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: is one of {count} files of a model, but is not named "
            f"NAME-00001-of-{count:05}.gguf: restore its name"
        )
    files = []
    metadata, tensors = {}, {}
    for number in range(count):
        file = path.with_name(f"{match[1]}-{number + 1:05}-of-{match[3]}.gguf")
        files.append(file)
        if not os.path.lexists(file):
            raise CheckpointError(f"{file}: missing, but {path.name} belongs to {count} files")
        own, found = _read_file(file)
        if own.get("split.no") != number or own.get("split.count") != count:
            raise CheckpointError(f"{file}: its metadata does not say that it is file {number + 1}")
        both = tensors.keys() & found.keys()
        if both:
            raise CheckpointError(f"{file}: tensor {min(both)!r} is also in another file")
        metadata, tensors = metadata or own, tensors | found
    stated = metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise CheckpointError(f"{path}: {len(tensors)} tensors are stored, not {stated} as it says")
    return Gguf(path, tuple(files), metadata, tensors)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    with open_regular(path) as file:
        try:
            return _Reader(path, file).read()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


class _Reader:
    """Reads the header of one file from its beginning to its end."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        self._read = 0  # bytes of the file that are or were in the buffer
        self._buffer, self._at = b"", 0
        self._strings_left = _MAX_STRINGS

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._take(len(_MAGIC)) != _MAGIC:
            raise self._fail("is not a GGUF file")
        version = self._integer("I")
        if version not in _VERSIONS:
            if version & 0xFFFF == 0:
                raise self._fail("is big-endian: convert the model again on a common machine")
            known = " and ".join(map(str, _VERSIONS))
            raise self._fail(f"has version {version} of the format; supported: {known}")
        tensors, keys = self._integer("Q"), self._integer("Q")
        if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
            raise self._fail(f"is damaged: its header has {tensors} tensors and {keys} keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string()
            if key in metadata:
                raise self._fail(f"is damaged: key {key!r:.60} is there twice")
            metadata[key] = self._value(key)
        return metadata, self._tensors(tensors, metadata)

    def _tensors(self, count: int, metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment % 8:
            raise self._fail(f"'general.alignment' must be a multiple of 8, not {alignment!r:.60}")
        found: dict[str, GgufTensor] = {}
        for _ in range(count):
            name = self._string()
            if name in found:
                raise self._fail(f"is damaged: tensor {name!r:.60} is there twice")
            found[name] = self._tensor(name, alignment)
        data = -(-self._position // alignment) * alignment
        for name, tensor in found.items():
            rows, start = _product(tensor.shape[:-1]), data + tensor.start
            if start + rows * tensor.row_bytes > self._size:
                raise self._fail(
                    f"is truncated: tensor {name!r:.60} ends at byte "
                    f"{start + rows * tensor.row_bytes}, but the file has {self._size}; "
                    "download it again"
                )
            found[name] = GgufTensor(self._path, start, tensor.type, tensor.shape)
        self._check_order(found)
        return found

    def _check_order(self, tensors: Mapping[str, GgufTensor]) -> None:
        """Raise CheckpointError for tensors that have bytes in common."""
        end, before = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                raise self._fail(f"is damaged: tensors {before!r:.60} and {name!r:.60} overlap")
            end = tensor.start + _product(tensor.shape[:-1]) * tensor.row_bytes
            before = name

    def _tensor(self, name: str, alignment: int) -> GgufTensor:
        """A tensor whose start is counted from the end of the header."""
        dimensions = self._integer("I")
        if not 0 < dimensions <= 4:
            raise self._fail(f"is damaged: tensor {name!r:.60} has {dimensions} dimensions")
        shape = tuple(self._integer("Q") for _ in range(dimensions))[::-1]
        number, start = self._integer("I"), self._integer("Q")
        if not 0 < _product(shape) <= _MAX_VALUES or start % alignment:
            raise self._fail(
                f"is damaged: tensor {name!r:.60} of shape {list(shape)} starts at {start}"
            )
        kind = TENSOR_TYPES.get(number)
        if kind is None:
            known = ", ".join(known.name for known in TENSOR_TYPES.values())
            raise self._fail(
                f"tensor {name!r:.60} has type {type_name(number)}, which is not supported; "
                f"supported: {known}"
            )
        if shape[-1] % kind.values:
            raise self._fail(
                f"is damaged: tensor {name!r:.60} of shape {list(shape)} does not consist of "
                f"whole blocks of {kind.name}"
            )
        return GgufTensor(self._path, start, kind, shape)

    def _value(self, key: str) -> Any:
        kind = self._integer("I")
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            code = _SCALARS[kind]
            (number,) = _numbers(code, self._take(struct.calcsize(f"<{code}")))
            if kind == _BOOL:
                return bool(number)
            return _shortest(number) if code == "f" else number
        if kind != _ARRAY:
            raise self._fail(f"is damaged: key {key!r:.60} has a value of unknown type {kind}")
        kind, count = self._integer("I"), self._integer("Q")
        if kind == _STRING:
            self._strings_left -= count
            if self._strings_left < 0:
                raise self._fail(f"has more than {_MAX_STRINGS} strings in its arrays")
            return [self._string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self._fail(f"key {key!r:.60} is an array of type {kind}, which is not supported")
        code = _SCALARS[kind]
        return _numbers(code, self._take(struct.calcsize(f"<{code}") * count))

    def _string(self) -> str:
        return self._take(self._integer("Q")).decode("utf-8", "replace")

    def _integer(self, code: str) -> int:
        return int.from_bytes(self._take(4 if code == "I" else 8), "little")

    @property
    def _position(self) -> int:
        return self._read - len(self._buffer) + self._at

    def _take(self, count: int) -> bytes:
        """The next bytes of the header."""
        start = self._at
        if start + count > len(self._buffer):
            if self._position + count > self._size:
                raise self._fail("is truncated within its header; download it again")
            if self._position + count > _MAX_HEADER:
                raise self._fail(f"has a header of more than {_MAX_HEADER >> 20} MiB")
            more = self._file.read(max(count, _CHUNK))
            self._read += len(more)
            self._buffer, start = self._buffer[start:] + more, 0
            if count > len(self._buffer):
                raise self._fail("became shorter while it was read")
        self._at = start + count
        return self._buffer[start : self._at]

    def _fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {problem}")


def _numbers(code: str, data: bytes) -> "array[Any]":
    """Little-endian numbers."""
    found: array[Any] = array(code)
    found.frombytes(data)
    if sys.byteorder == "big":
        found.byteswap()
    return found


def _shortest(number: float) -> float:
    """The shortest decimal number with this float32 value: 1e-05 instead of 9.99999974e-06."""
    shorter = (float(f"{number:.{digits}g}") for digits in range(6, 9))
    return next((short for short in shorter if array("f", [short])[0] == number), number)


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
