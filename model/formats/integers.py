"""Integers of 8 or 4 bits, of which groups along the inputs share a scale: the form in memory.

Weights come into it from checkpoints that store such integers, or from 16 bits as they are loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.formats.dense import DENSE, FilledFromDense
from model.formats.format import WeightFormat

if TYPE_CHECKING:
    from model.ops.backend import Backend

_SMALLEST_GROUP = 32  # of inputs that share a scale: the kernels need a multiple of it
_SCALE_BYTES = 2  # of a scale, and of a zero


@dataclass(frozen=True)
class Integers(FilledFromDense):
    """Codes of `bits` bits with a float16 scale, and a float16 zero if has_zeros, per group.

    group: inputs that share a scale, a multiple of 32; 0: all of them. rows: as in IntegerFormat.
    As a format of a checkpoint it is that of dense weights, which are quantized as they are loaded.
    quantizes: whether this is wanted; otherwise only integers are taken.
    """

    bits: int
    group: int = _SMALLEST_GROUP
    has_zeros: bool = False  # values are (code + zero) · scale; otherwise code · scale
    rows: str = "8"
    quantizes: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name that --quantize and reports have for it."""
        return f"int{self.bits}"

    def group_of(self, inputs: int) -> int:
        """As IntegerFormat.group_of: 32 where the format's group does not divide the inputs."""
        if not self.group:
            return inputs
        return self.group if inputs % self.group == 0 else _SMALLEST_GROUP

    def allocate(self, backend: Backend, shape: tuple[int, ...], parts: int = 1) -> Any:
        """As WeightFormat.allocate; rows are filled from a tensor or from GroupedInt."""
        return backend.empty_integers(shape, self, parts)

    def bytes(self, shape: tuple[int, ...], item: int) -> int:
        """As WeightFormat.bytes: 20 for 32 values of INT4."""
        *outer, inputs = shape
        scales = -(-inputs // self.group_of(inputs)) * _SCALE_BYTES
        return math.prod(outer) * (inputs * self.bits // 8 + scales * (1 + self.has_zeros))

    def held(self, backend: Backend, *, stacked: bool) -> WeightFormat:
        """As WeightFormat.held: dense where the backend has no kernels for integers."""
        return self if backend.keeps_integers(self.quantizes) else DENSE


def integers_of(bits: int, group: int | None, *, has_zeros: bool) -> WeightFormat:
    """The format in memory of a checkpoint's integers of 4 or 8 bits.

    group: inputs that share a scale; None: all of them. Dense for what the kernels do not take.
    """
    if group is not None and group % _SMALLEST_GROUP:
        return DENSE
    return Integers(bits, group or 0, has_zeros, rows="16", quantizes=False)


INT8 = Integers(8, 0, rows="rotated 8")
INT4 = Integers(4, 32, has_zeros=True)
