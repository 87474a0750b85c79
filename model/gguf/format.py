"""The types of GGUF's tensors as formats of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.formats.dense import DENSE, Dequantized
from model.formats.format import Part, StoredTensor, WeightFormat
from model.formats.integers import integers_of
from model.formats.mxfp4 import MXFP4

if TYPE_CHECKING:
    import torch

    from model.ops.backend import Backend


_GROUP = 32  # values that share a scale in the following types
_INTEGERS = {
    "Q8_0": (8, False),
    "Q5_0": (8, False),
    "Q5_1": (8, True),
    "Q5_K": (8, True),
    "Q4_0": (4, False),
    "Q4_1": (4, True),
    "Q4_K": (4, True),
}
"""Bits that a type has in memory, and whether it has zeros."""


@dataclass(frozen=True)
class GgufFormat(Dequantized):
    """One tensor of a quantized type."""

    type: str

    @property
    def name(self) -> str:  # type: ignore[override]
        """As reports show it."""
        return self.type

    def stored(
        self, name: str, shape: tuple[int, ...], part: Part = (), *, transposed: bool = False
    ) -> list[StoredTensor]:
        """As WeightFormat.stored; GgufFiles reads it as integers or MXFP4."""
        return [StoredTensor(name, shape, (self.type,), part)]

    def source(self, tensors: list[torch.Tensor], *, transposed: bool = False) -> Any:
        """As WeightFormat.source."""
        (weight,) = tensors
        return weight

    @property
    def kept(self) -> WeightFormat:
        """As WeightFormat.kept: dense for types whose groups are of 16 values."""
        bits, has_zeros = _INTEGERS.get(self.type, (0, False))
        return integers_of(bits, _GROUP, has_zeros=has_zeros) if bits else DENSE

    def held(self, backend: Backend, *, stacked: bool) -> WeightFormat:
        """As WeightFormat.held."""
        if self.type == "MXFP4":
            return MXFP4.held(backend, stacked=stacked)
        return super().held(backend, stacked=stacked)
