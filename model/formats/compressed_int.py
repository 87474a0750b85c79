"""The integers of compressed-tensors: a byte each, or packed in words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from model.formats.dense import DENSE, FLOATS, Dequantized
from model.formats.format import Find, Part, StoredTensor, WeightFormat
from model.formats.integers import integers_of
from model.formats.packing import by_index, cut, grouped, in_order, scaled, unpack

if TYPE_CHECKING:
    import torch

_WORD_BITS = 32


@dataclass(frozen=True)
class CompressedInt(Dequantized):
    """value = scale · (integer - zero point), with a scale for each output and group of inputs.

    Signed integers; in words they are stored with half of their range added.
    """

    bits: int  # 4 or 8
    group: int | None  # inputs that share a scale; None: all, and a single scale may be for all
    is_symmetric: bool  # no zero points
    is_packed: bool
    is_ordered: bool = False  # the inputs' groups are given one by one, in the files
    # Of one weight in a checkpoint:
    scale_shape: tuple[int, ...] | None = None
    has_shape: bool = False
    has_index: bool = False
    first: int = 0  # input of the part that is read

    @property
    def name(self) -> str:  # type: ignore[override]
        """As reports show it."""
        return f"int{self.bits}"

    @property
    def kept(self) -> WeightFormat:
        """As WeightFormat.kept: dense if the inputs of a group are not neighbours."""
        if self.is_ordered:
            return DENSE
        return integers_of(self.bits, self.group, has_zeros=not self.is_symmetric)

    @property
    def _per_word(self) -> int:
        return _WORD_BITS // self.bits

    def variant(self, name: str, shape: tuple[int, ...], part: Part, find: Find) -> WeightFormat:
        """As Dequantized.variant."""
        allowed = self._scale_shapes(shape)
        found = find(f"{name}_scale")
        return replace(
            self,
            scale_shape=found[0] if found is not None and found[0] in allowed else allowed[0],
            is_symmetric=self.is_symmetric and find(f"{name}_zero_point") is None,
            has_shape=find(f"{name}_shape") is not None,
            has_index=find(f"{name}_g_idx") is not None,
            first=part[1].indices(shape[1])[0] if len(part) > 1 else 0,
        )

    def _scale_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        outputs, inputs = shape
        if self.group is None:
            return [(outputs, 1), (1,), ()]
        if inputs % self.group:
            raise ValueError(f"{inputs} inputs are not a multiple of the group size {self.group}")
        return [(outputs, inputs // self.group)]

    def stored(
        self, name: str, shape: tuple[int, ...], part: Part = (), *, transposed: bool = False
    ) -> list[StoredTensor]:
        """As WeightFormat.stored.

        Packed: words int32 [out, in / integers of a word], zero points in words along outputs.
        """
        outputs, inputs = shape
        per_word = self._per_word
        if inputs % per_word:
            raise ValueError(f"{inputs} inputs are not a multiple of {per_word}")
        found = []
        if self.is_packed:
            columns = scaled(part[1], inputs, per_word) if len(part) > 1 else slice(None)
            words = (outputs, inputs // per_word)
            rows = part[:1] or (slice(None),)
            found.append(StoredTensor(f"{name}_packed", words, ("I32",), (*rows, columns)))
        else:
            found.append(StoredTensor(name, shape, ("I8",), part))
        scales = self._scale_shapes(shape)[0] if self.scale_shape is None else self.scale_shape
        scale_part: Part = ()
        if len(scales) == 2:
            whole = self.has_index or self.group is None
            scale_part = part[:1] if whole else cut(part, shape, self.group or 1)
        found.append(StoredTensor(f"{name}_scale", scales, FLOATS, scale_part))
        if not self.is_symmetric:
            found.append(self._zeros(name, scales, scale_part))
        if self.has_index:
            found.append(StoredTensor(f"{name}_g_idx", (inputs,), ("I32", "I64"), part[1:]))
        if self.has_shape:
            found.append(StoredTensor(f"{name}_shape", (2,), ("I64", "I32")))
        return found

    def _zeros(self, name: str, scales: tuple[int, ...], part: Part) -> StoredTensor:
        if not self.is_packed or len(scales) < 2:
            return StoredTensor(f"{name}_zero_point", scales, ("I8",), part)
        outputs, groups = scales
        if part:
            part = (scaled(part[0], outputs, self._per_word), *part[1:])
        words = (-(-outputs // self._per_word), groups)
        return StoredTensor(f"{name}_zero_point", words, ("I32",), part)

    def source(self, tensors: list[torch.Tensor], *, transposed: bool = False) -> Any:
        """As WeightFormat.source: GroupedInt, or a tensor if the inputs' groups are mixed."""
        import torch

        if self.has_shape:
            *tensors, _ = tensors
        codes, scales, *rest = tensors
        index = rest.pop() if self.has_index else None
        half = 1 << (self.bits - 1)
        if self.is_packed:
            codes = unpack(codes, self.bits, codes.shape[1] * self._per_word)
        else:
            codes = codes.view(torch.uint8) + half
            if int(codes.max()) >= 1 << self.bits:
                raise ValueError(f"an integer has more than {self.bits} bits")
        scales = scales.reshape(1, -1) if scales.dim() < 2 else scales
        scales = scales.expand(len(codes), scales.shape[1])
        zeros = half if self.is_symmetric else self._read_zeros(rest[0], scales.shape)
        if index is None:
            return grouped(codes, scales, zeros, self.bits)
        if int(index.min()) == -1:  # it stands for the order as it is
            index = (self.first + torch.arange(codes.shape[1])) // (self.group or codes.shape[1])
        if in_order(index, scales.shape[1]):
            return grouped(codes, scales, zeros, self.bits)
        return by_index(codes, scales, zeros, index)

    def _read_zeros(self, zeros: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The zero points [out, groups], with half of the range added."""
        import torch

        if zeros.dtype == torch.int32:
            return unpack(zeros.T, self.bits, shape[0]).T.float()
        return (zeros.float() + (1 << (self.bits - 1))).expand(shape)
