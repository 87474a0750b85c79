"""MXFP4: 32 values along the inputs share a scale (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.formats.dense import DENSE
from model.formats.format import Part, StoredTensor, WeightFormat

if TYPE_CHECKING:
    import torch

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
        if len(part) == len(shape):
            first, last, _ = part[-1].indices(inputs)
            part = (*part[:-1], slice(first // _VALUES, last // _VALUES))
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
        """As WeightFormat.dense."""
        values: torch.Tensor = weight.dense(dtype)
        return values

    def bytes(self, shape: tuple[int, ...], item: int) -> int:
        """As WeightFormat.bytes: 17 bytes for 32 values."""
        *outer, inputs = shape
        return math.prod(outer) * -(-inputs // _VALUES) * (_BLOCK_BYTES + _SCALE_BYTES)

    def held(self, backend: Backend) -> WeightFormat:
        """As WeightFormat.held: dense where the backend has no kernel for MXFP4."""
        return self if backend.keeps_mxfp4 else DENSE


MXFP4 = Mxfp4Format()


def read_settings(settings: Mapping[str, Any]) -> dict[str, WeightFormat]:
    """The fields of ModelConfig that a `quantization_config` of this method sets."""
    return {"expert_format": MXFP4}
