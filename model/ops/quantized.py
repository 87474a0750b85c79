"""Weights as small integers with a scale per group of inputs."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GroupedInt:
    """Weights [..., out, in] as integers with a scale (and an offset) per output and group of
    inputs: value = scale · code + offset.
    """

    bits: int  # 4 or 8
    # int8 [..., out, in], one code a byte: from -128 to 127 with 8 bits, from 0 to 15 with 4.
    codes: torch.Tensor
    scales: torch.Tensor  # float32 [..., out, in / group]
    # float32 as scales; None: 0. Symmetric weights of 4 bits have -8 · scale.
    offsets: torch.Tensor | None

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

    def __getitem__(self, index: int | slice) -> "GroupedInt":
        """Return a part of the first dimension: of the experts, or of one weight's outputs."""
        offsets = None if self.offsets is None else self.offsets[index]
        return GroupedInt(self.bits, self.codes[index], self.scales[index], offsets)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values [..., out, in], computed in float32, as one dense tensor."""
        codes = self.codes.unflatten(-1, (-1, self.group)).float()
        values = codes.mul_(self.scales.unsqueeze(-1))
        if self.offsets is not None:
            values.add_(self.offsets.unsqueeze(-1))
        return values.flatten(-2).to(dtype)
