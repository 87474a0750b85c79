"""E4M3 with a scale for each output and group of inputs: the form of FP8 in memory.

Weights come into it from checkpoints in FP8, or from 16 bits as they are loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from model.formats.dense import DENSE, FilledFromDense
from model.formats.format import WeightFormat

if TYPE_CHECKING:
    from model.ops.backend import Backend

Inputs = Literal["", "dynamic", "static"]
"""How inputs of a linear become e4m3: with their own scales, the checkpoint's, or not at all."""

_SCALE_BYTES = 4


@dataclass(frozen=True)
class Float8(FilledFromDense):
    """One byte per value, and a float32 scale for each output and group of inputs.

    group: inputs that share a scale; 0: all of them. inputs: how kernels that multiply e4m3 round
    the inputs of the linear; other kernels convert the weights, and round nothing. quantizes:
    whether dense weights become e4m3 as they are loaded; otherwise only e4m3 is taken.
    """

    group: int = 0
    inputs: Inputs = ""
    quantizes: bool = False

    name = "fp8"

    def allocate(self, backend: Backend, shape: tuple[int, ...], parts: int = 1) -> Any:
        """As WeightFormat.allocate; rows are filled from GroupedFloat, or also from a tensor."""
        return backend.empty_float8(shape, self, parts)

    def bytes(self, shape: tuple[int, ...], item: int) -> int:
        """As WeightFormat.bytes."""
        *outer, inputs = shape
        return math.prod(outer) * (inputs + -(-inputs // (self.group or inputs)) * _SCALE_BYTES)

    def held(self, backend: Backend, *, stacked: bool) -> WeightFormat:
        """As WeightFormat.held: dense where the backend does not keep e4m3."""
        return self if backend.keeps_float8(self.quantizes) else DENSE


FP8 = Float8(inputs="dynamic", quantizes=True)
