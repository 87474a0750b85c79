"""Weights as small numbers with a scale per group of inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

_CHUNK_VALUES = 16 << 20  # values that are float32 at the same time


class _Grouped(ABC):
    """What both kinds have in common: codes [..., out, in], scales float32 [..., out, in / group].

    Each is one weight, or a stack of weights.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values: ..., out, in."""
        return tuple(self.codes.shape)

    @property
    def device(self) -> torch.device:
        """The device of the storage."""
        return self.codes.device

    @property
    def group(self) -> int:
        """Neighbouring inputs that share a scale."""
        return self.codes.shape[-1] // self.scales.shape[-1]

    def __len__(self) -> int:
        """Return the length of the first dimension."""
        return len(self.codes)

    @abstractmethod
    def __getitem__(self, index: int | slice) -> _Grouped:
        """Return a part of the first dimension: of the experts, or of one weight's outputs."""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values [..., out, in], computed in float32, as one dense tensor."""
        values = torch.empty(self.shape, dtype=dtype, device=self.device)
        rows = max(1, _CHUNK_VALUES * len(self) // max(1, self.codes.numel()))
        for first in range(0, len(self), rows):
            part = slice(first, first + rows)
            values[part].copy_(self[part]._values())
        return values

    def _values(self) -> torch.Tensor:
        """The values in float32."""
        codes = self.codes.unflatten(-1, (-1, self.group)).float()
        return codes.mul_(self.scales.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class GroupedInt(_Grouped):
    """Weights [..., out, in] as integers with a scale (and an offset) per output and group of
    inputs: value = scale · code + offset.
    """

    bits: int  # 4 or 8
    # int8 [..., out, in], one code a byte: from -128 to 127 with 8 bits, from 0 to 15 with 4.
    codes: torch.Tensor
    scales: torch.Tensor  # float32 [..., out, in / group]
    # float32 as scales; None: 0. Symmetric weights of 4 bits have -8 · scale.
    offsets: torch.Tensor | None

    def __getitem__(self, index: int | slice) -> GroupedInt:
        """Return a part of the first dimension: of the experts, or of one weight's outputs."""
        offsets = None if self.offsets is None else self.offsets[index]
        return GroupedInt(self.bits, self.codes[index], self.scales[index], offsets)

    def _values(self) -> torch.Tensor:
        values = super()._values()
        if self.offsets is not None:
            values.unflatten(-1, (-1, self.group)).add_(self.offsets.unsqueeze(-1))
        return values


@dataclass(frozen=True)
class GroupedFloat(_Grouped):
    """Weights [..., out, in] as floats with a scale per output and group of inputs:
    value = scale · code.
    """

    codes: torch.Tensor  # [..., out, in] of a dtype of 8 bits
    scales: torch.Tensor  # float32 [..., out, in / group]

    def __getitem__(self, index: int | slice) -> GroupedFloat:
        """Return a part of the first dimension: of the experts, or of one weight's outputs."""
        return GroupedFloat(self.codes[index], self.scales[index])
