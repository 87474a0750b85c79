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


_GROUP = 32  # values that share a scale in memory
_INTEGERS = {
    "Q8_0": (8, False),
    "Q6_K": (8, False),
    "Q5_0": (8, False),
    "Q5_1": (8, True),
    "Q5_K": (8, True),
    "Q4_0": (4, False),
    "Q4_1": (4, True),
    "Q4_K": (4, True),
    "Q3_K": (8, False),
    "Q2_K": (8, False),
    "IQ4_NL": (8, False),
    "IQ4_XS": (8, False),
}
"""Bits that a type has in memory, and whether it has zeros."""
_SMALL_GROUPS = ("Q2_K", "Q3_K", "Q6_K")  # 16 values share a scale


def has_integers(name: str) -> bool:
    """Whether a type's values are integers with a scale for each group."""
    return name in _INTEGERS


@dataclass(frozen=True)
class GgufFormat(Dequantized):
    """One tensor of a quantized type."""

    type: str
    is_mixed: bool = False  # other tensors of the same matrix in memory have another type

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
        """As WeightFormat.kept: 8 bits for a matrix of several types."""
        if self.type == "MXFP4":
            return MXFP4
        bits, has_zeros = (8, True) if self.is_mixed else _INTEGERS.get(self.type, (0, False))
        return integers_of(bits, _GROUP, has_zeros=has_zeros) if bits else DENSE

    @property
    def change(self) -> str:
        """As Dequantized.change."""
        if self.type in _SMALL_GROUPS:
            return f"rounded to int8 with a scale for {_GROUP} values"
        if self.type.startswith("Q4"):
            return "converted to int8 where they have one format with other types" * self.is_mixed
        return "" if self.type == "Q8_0" else "converted to int8 with the same values"
