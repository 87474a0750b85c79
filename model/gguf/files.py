"""Reads the weights of GGUF files, with the interface of CheckpointFiles."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.config import CheckpointError, ModelConfig, open_regular
from model.formats import StoredTensor
from model.gguf.blocks import read_floats, read_integers, read_mxfp4
from model.gguf.header import GgufTensor, is_gguf, read_gguf
from model.gguf.names import USED_BY_CONFIG, rotated_rows, tensor_names
from model.ops.mxfp4 import MXFP4_BLOCK, Mxfp4
from model.ops.quantized import GroupedInt

_CHUNK_VALUES = 8 << 20  # of which the integers are unpacked at a time

__all__ = ["GgufFiles", "is_gguf"]

Weight = torch.Tensor | GroupedInt | Mxfp4
"""Rows [outputs, inputs] in the form that their type has in memory."""


class GgufFiles:
    """The tensors of a model in GGUF files.

    Raises CheckpointError for damaged files. Files stay open until the stack is closed.
    """

    config_name = "its metadata"

    def __init__(self, path: Path, config: ModelConfig, stack: contextlib.ExitStack):
        self.folder, self._config, self._stack = path, config, stack
        self._gguf = read_gguf(path)
        self._open: dict[Path, int] = {}
        self._tensors = {
            name: tensor
            for name, tensor in self._gguf.tensors.items()
            if name not in USED_BY_CONFIG
        }
        self.file_of = {name: tensor.file.name for name, tensor in self._tensors.items()}
        self.names = tensor_names(self._gguf)

    def path(self, name: str) -> Path:
        """The file that contains a tensor."""
        return self._tensors[name].file

    def order(self, name: str) -> tuple[str, int]:
        """The position of a tensor when all files are read in order."""
        tensor = self._tensors[name]
        return tensor.file.name, tensor.start

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type of a tensor."""
        tensor = self._tensors[name]
        return tensor.shape, tensor.type.name

    def read(self, stored: StoredTensor) -> Any:
        """The part of a tensor that this rank needs: a weight, or a vector, or experts."""
        tensor = self._tensors[stored.name]
        slices = [*stored.part, *[slice(None)] * (len(tensor.shape) - len(stored.part))]
        if len(tensor.shape) == 3:
            return Experts(self, tensor, range(tensor.shape[0])[slices[0]])
        config = self._config
        rotated = rotated_rows(
            self._gguf, stored.name, config.num_heads, config.num_kv_heads, config.head_dim
        )

        def in_order(rows: torch.Tensor) -> torch.Tensor:
            return (
                rows.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)
            )

        if len(tensor.shape) == 1:
            values = self.rows(tensor, 0, 1)
            assert isinstance(values, torch.Tensor)  # vectors are not quantized
            values = values[0]
            return torch.cat((in_order(values[:rotated]), values[rotated:]))[slices[0]]
        first, last, _ = slices[0].indices(tensor.shape[0])
        rows = self.rows(tensor, first, last)
        if first < rotated:  # no part has rows of both kinds
            rows = _mapped(rows, in_order)
        return _columns(rows, *slices[1].indices(tensor.shape[1])[:2])

    def close_if_large(self) -> None:
        """Do nothing: tensors are copied, not mapped."""

    def rows(self, tensor: GgufTensor, first: int, last: int) -> Weight:
        """Rows [rows, inputs] of a tensor, counted over all experts."""
        step = max(1, _CHUNK_VALUES // tensor.shape[-1])
        parts = [
            self._rows(tensor, start, min(last, start + step)) for start in range(first, last, step)
        ]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _rows(self, tensor: GgufTensor, first: int, last: int) -> Weight:
        kind, size = tensor.type, tensor.row_bytes
        data = bytearray((last - first) * size)
        self._read_into(tensor.file, data, tensor.start + first * size)
        values = torch.frombuffer(data, dtype=torch.uint8).view(last - first, size)
        if kind.values == 1:
            return read_floats(kind.name, values)
        blocks = values.unflatten(-1, (-1, kind.bytes))
        return read_mxfp4(blocks) if kind.name == "MXFP4" else read_integers(kind.name, blocks)

    def _read_into(self, file: Path, data: bytearray, start: int) -> None:
        if file not in self._open:
            self._open[file] = self._stack.enter_context(open_regular(file)).fileno()
        done, view = 0, memoryview(data)
        while done < len(data):
            try:
                count = os.preadv(self._open[file], [view[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
            if not count:
                raise CheckpointError(f"{file}: became shorter while it was read")
            done += count


@dataclass(frozen=True)
class Experts:
    """The weights [experts, outputs, inputs] of a layer, each of which is read when indexed."""

    files: GgufFiles
    tensor: GgufTensor
    numbers: range  # of this rank's experts
    dtype: torch.dtype | None = None  # that they are converted to, if they are quantized

    def dense(self, dtype: torch.dtype) -> "Experts":
        """The same experts as dense weights of this dtype."""
        return replace(self, dtype=dtype)

    def __len__(self) -> int:
        """The number of experts."""
        return len(self.numbers)

    def __getitem__(self, index: int) -> Weight:
        """One expert's weight."""
        outputs = self.tensor.shape[1]
        first = self.numbers[index] * outputs
        weight = self.files.rows(self.tensor, first, first + outputs)
        if isinstance(weight, torch.Tensor) or self.dtype is None:
            return weight
        return weight.dense(self.dtype)


def _mapped(weight: Weight, function: Callable[[torch.Tensor], torch.Tensor]) -> Weight:
    """A weight whose tensors, which have the same rows, are results of the function."""
    if isinstance(weight, torch.Tensor):
        return function(weight)
    if isinstance(weight, Mxfp4):
        return Mxfp4(function(weight.blocks), function(weight.scales))
    offsets = None if weight.offsets is None else function(weight.offsets)
    return GroupedInt(weight.bits, function(weight.codes), function(weight.scales), offsets)


def _columns(weight: Weight, first: int, last: int) -> Weight:
    """Some inputs of a weight, which becomes dense if they are not whole groups."""
    if isinstance(weight, torch.Tensor):
        return weight[:, first:last]
    if last - first == weight.shape[1]:
        return weight
    group = MXFP4_BLOCK if isinstance(weight, Mxfp4) else weight.group
    if first % group or last % group:
        return weight.dense(torch.float32)[:, first:last]
    groups = slice(first // group, last // group)
    if isinstance(weight, Mxfp4):
        return Mxfp4(weight.blocks[:, groups], weight.scales[:, groups])
    offsets = None if weight.offsets is None else weight.offsets[:, groups]
    return GroupedInt(weight.bits, weight.codes[:, first:last], weight.scales[:, groups], offsets)


def _joined(parts: list[Weight]) -> Weight:
    """Rows of equal weights, one after the other."""
    columns = zip(*map(_tensors, parts), strict=True)
    joined = iter([torch.cat(column) for column in columns])
    return _mapped(parts[0], lambda tensor: next(joined))


def _tensors(weight: Weight) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    _mapped(weight, note)
    return found
