"""MXFP4 as checkpoints store it (OCP Microscaling Formats 1.0, sections 5.2 and 5.3.3)."""

from dataclasses import dataclass

import torch

# The 16 values of FP4 E2M1 by code: bit 3 is the sign.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_BLOCK = 32  # values that share one scale


@dataclass(frozen=True)
class Mxfp4:
    """Weights [..., out, in] as MXFP4: 32 values along `in` share a power-of-two scale."""

    blocks: torch.Tensor  # uint8 [..., out, in / 32, 16], two values per byte, low nibble first
    scales: torch.Tensor  # uint8 [..., out, in / 32], E8M0 with bias 127

    @classmethod
    def empty(cls, shape: tuple[int, ...], device: torch.device) -> "Mxfp4":
        """Uninitialized storage for weights of this shape [..., out, in]."""
        groups = (*shape[:-1], shape[-1] // MXFP4_BLOCK)
        return cls(
            torch.empty(*groups, MXFP4_BLOCK // 2, dtype=torch.uint8, device=device),
            torch.empty(groups, dtype=torch.uint8, device=device),
        )

    @property
    def device(self) -> torch.device:
        """The device of the storage."""
        return self.blocks.device

    def __len__(self) -> int:
        """Return the number of experts."""
        return len(self.blocks)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values: experts, out, in."""
        *outer, groups = self.scales.shape
        return *outer, groups * MXFP4_BLOCK

    def __getitem__(self, index: int | slice) -> "Mxfp4":
        """Return one expert, or one expert's rows."""
        return Mxfp4(self.blocks[index], self.scales[index])

    def copy_(self, source: "Mxfp4") -> None:
        """Copy the values of another weight of the same shape."""
        self.blocks.copy_(source.blocks)
        self.scales.copy_(source.scales)

    def random_(self, generator: torch.Generator) -> None:
        """Fill with random values of a typical magnitude."""
        self.blocks.random_(0, 256, generator=generator)
        self.scales.fill_(120)  # values of up to 6 · 2⁻⁷

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values as one dense tensor."""
        return dequantize_mxfp4(self.blocks, self.scales, dtype)


def dequantize_mxfp4(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """MXFP4 → dense: blocks uint8 [..., groups, 16], scales uint8 [..., groups] → [..., groups·32].

    Two values per byte, low nibble first; a scale is a power of two, E8M0 with bias 127.
    """
    values = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)], device=blocks.device)
    pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    # Scales are built from their bits: torch compiles exp2 when a GPU first needs it.
    bits = torch.where(scales == 0, 1 << 22, scales.int() << 23)
    dense = values[pairs.int()] * bits.view(torch.float32).unsqueeze(-1)
    return dense.flatten(-2).to(dtype)
