"""MXFP4: 32 values along the inputs share a scale (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.formats.dense import DENSE, is_dense
from model.formats.format import Find, Part, StoredTensor, WeightFormat
from model.formats.packing import cut
from model.formats.rules import FormatRules, Rule

if TYPE_CHECKING:
    import torch

    from model.families.config_keys.keys import Keys
    from model.ops.backend import Backend

_VALUES = 32  # per block: 4 bits each, two per byte
_BLOCK_BYTES = _VALUES // 2
_SCALE_BYTES = 1


@dataclass(frozen=True)
class Mxfp4Format(WeightFormat):
    """Two tensors, NAME_blocks and NAME_scales, which run along the inputs."""

    name = "mxfp4"

    def stored(
        self, name: str, shape: tuple[int, ...], part: Part = (), *, transposed: bool = False
    ) -> list[StoredTensor]:
        """As WeightFormat.stored: blocks uint8 [..., out, in / 32, 16], scales [..., out, in / 32].

        A slice of the inputs must begin and end between blocks.
        """
        *outer, inputs = shape
        groups = inputs // _VALUES
        part = cut(part, shape, _VALUES)
        return [
            StoredTensor(f"{name}_blocks", (*outer, groups, _BLOCK_BYTES), ("U8",), part),
            StoredTensor(f"{name}_scales", (*outer, groups), ("U8",), part),
        ]

    def source(self, tensors: list[torch.Tensor], *, transposed: bool = False) -> Any:
        """As WeightFormat.source."""
        from model.ops.mxfp4 import Mxfp4

        return Mxfp4(*tensors)

    def allocate(self, backend: Backend, shape: tuple[int, ...], parts: int = 1) -> Any:
        """As WeightFormat.allocate."""
        return backend.empty_mxfp4(shape, parts)

    def finish(self, backend: Backend, storage: Any) -> Any:
        """As WeightFormat.finish: without a kernel, dense, converted expert by expert."""
        return backend.pack_mxfp4(storage)

    def fill_random(self, storage: Any, generator: torch.Generator) -> None:
        """As WeightFormat.fill_random."""
        storage.random_(generator)

    def dense(self, weight: Any, dtype: torch.dtype) -> torch.Tensor:
        """As WeightFormat.dense, also for a weight which `finish` made dense."""
        from model.ops.mxfp4 import Mxfp4

        values: torch.Tensor = weight.dense(dtype) if isinstance(weight, Mxfp4) else weight
        return values

    def bytes(self, shape: tuple[int, ...], item: int) -> int:
        """As WeightFormat.bytes: 17 bytes for 32 values."""
        *outer, inputs = shape
        return math.prod(outer) * -(-inputs // _VALUES) * (_BLOCK_BYTES + _SCALE_BYTES)

    def held(self, backend: Backend, *, stacked: bool) -> WeightFormat:
        """As WeightFormat.held: dense where the backend has no kernel for MXFP4."""
        return MXFP4 if backend.keeps_mxfp4(stacked) else DENSE


MXFP4 = Mxfp4Format()


@dataclass(frozen=True)
class PackedMxfp4(Mxfp4Format):
    """MXFP4 as compressed-tensors stores it: NAME_packed and NAME_scale."""

    def as_stored(self, name: str, shape: tuple[int, ...], part: Part, find: Find) -> WeightFormat:
        """As WeightFormat.as_stored: DENSE if the weight was not quantized."""
        return DENSE if is_dense(name, find) else self

    def stored(
        self, name: str, shape: tuple[int, ...], part: Part = (), *, transposed: bool = False
    ) -> list[StoredTensor]:
        """As WeightFormat.stored: packed uint8 [out, in / 2], scale uint8 [out, in / 32]."""
        outputs, inputs = shape
        codes = cut(part, shape, _VALUES, _BLOCK_BYTES)
        return [
            StoredTensor(f"{name}_packed", (outputs, inputs // 2), ("U8",), codes),
            StoredTensor(
                f"{name}_scale", (outputs, inputs // _VALUES), ("U8",), cut(part, shape, _VALUES)
            ),
        ]

    def source(self, tensors: list[torch.Tensor], *, transposed: bool = False) -> Any:
        """As WeightFormat.source."""
        from model.ops.mxfp4 import Mxfp4

        codes, scales = tensors
        return Mxfp4(codes.unflatten(-1, (-1, _BLOCK_BYTES)), scales)


def read_settings(keys: Keys) -> FormatRules:
    """The formats of a checkpoint with this `quantization_config`: experts in one stack."""
    return FormatRules((Rule(MXFP4, patterns=(r".*\.experts\.",)),))
