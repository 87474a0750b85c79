"""The types of GGUF's tensors as formats of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.formats.dense import Dequantized
from model.formats.format import Part, StoredTensor, WeightFormat
from model.formats.mxfp4 import MXFP4

if TYPE_CHECKING:
    import torch

    from model.ops.backend import Backend


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

    def held(self, backend: Backend, *, stacked: bool) -> WeightFormat:
        """As WeightFormat.held."""
        if self.type == "MXFP4":
            return MXFP4.held(backend, stacked=stacked)
        return super().held(backend, stacked=stacked)
