"""The blocks of GGUF's quantized types → integers with scales, or values.

Each type is integers with a scale and an offset for every 16 or 32 of them, so that none of them
loses anything here. The layouts are those of ggml-common.h, the order of the values that of
`dequantize_row_*` in ggml-quants.c.
"""

from collections.abc import Callable

import torch

from model.ops.mxfp4 import Mxfp4
from model.ops.quantized import GroupedInt

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_floats(name: str, data: torch.Tensor) -> torch.Tensor:
    """The values of rows uint8 [..., bytes] of a type that is not quantized."""
    return data.view(_FLOATS[name])


def read_mxfp4(blocks: torch.Tensor) -> Mxfp4:
    """Blocks uint8 [..., blocks, 17], whose first 16 values are in the low halves of the bytes."""
    scales, packed = blocks[..., 0].contiguous(), blocks[..., 1:]
    codes = torch.cat((packed & 15, packed >> 4), -1)  # in order
    return Mxfp4(codes[..., 0::2] | (codes[..., 1::2] << 4), scales)


def read_integers(name: str, blocks: torch.Tensor) -> GroupedInt:
    """Blocks uint8 [..., blocks, bytes] of the type `name` as weights [..., inputs]."""
    bits, codes, scales, offsets = _READERS[name](blocks)
    return GroupedInt(
        bits,
        codes.flatten(-2).to(torch.int8),
        scales.flatten(-2).contiguous(),
        None if offsets is None else offsets.flatten(-2).contiguous(),
    )


_Read = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Bits of a GroupedInt, codes [..., blocks, values], scales and offsets [..., blocks, groups]."""


def _half(data: torch.Tensor) -> torch.Tensor:
    """Two bytes of each block, as float32 [..., blocks, 1]."""
    return data.contiguous().view(torch.float16).float()


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """The low halves of the bytes, then the high ones."""
    return torch.cat((data & 15, data >> 4), -1)


def _planes(data: torch.Tensor, width: int, bits: int) -> torch.Tensor:
    """The values of `bits` bits in bytes [..., n], in order.

    Of each `width` bytes the lowest bits come first, then the next ones.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1)
    planes = (data.unflatten(-1, (-1, width)).unsqueeze(-2) >> shifts) & ((1 << bits) - 1)
    return planes.flatten(-3)


def _fifth_bits(data: torch.Tensor) -> torch.Tensor:
    """The bits of four bytes [..., 4], the lowest first, as 16 [..., 32]."""
    bits = (data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(-2) << 4


def _q8_0(data: torch.Tensor) -> _Read:
    return 8, data[..., 2:].view(torch.int8), _half(data[..., :2]), None


def _q4_0(data: torch.Tensor) -> _Read:
    scales = _half(data[..., :2])
    return 4, _nibbles(data[..., 2:]), scales, -8 * scales


def _q4_1(data: torch.Tensor) -> _Read:
    return 4, _nibbles(data[..., 4:]), _half(data[..., :2]), _half(data[..., 2:4])


def _q5_0(data: torch.Tensor) -> _Read:
    codes = _nibbles(data[..., 6:]) | _fifth_bits(data[..., 2:6])
    return 8, codes.to(torch.int8) - 16, _half(data[..., :2]), None


def _q5_1(data: torch.Tensor) -> _Read:
    codes = _nibbles(data[..., 8:]) | _fifth_bits(data[..., 4:8])
    return 8, codes, _half(data[..., :2]), _half(data[..., 2:4])


def _q2_k(data: torch.Tensor) -> _Read:
    levels, scale, minimum = data[..., :16], _half(data[..., 80:82]), _half(data[..., 82:84])
    codes = _planes(data[..., 16:80], 32, 2)
    return 4, codes, scale * (levels & 15), -(minimum * (levels >> 4))


def _q3_k(data: torch.Tensor) -> _Read:
    high, low, packed = data[..., :32], data[..., 32:96], data[..., 96:108]
    codes = _planes(low, 32, 2) | (_planes(high, 32, 1) << 2)
    levels = _nibbles(packed[..., :8]) | (_planes(packed[..., 8:], 4, 2) << 4)
    scales = _half(data[..., 108:110]) * (levels.to(torch.int8) - 32)
    return 4, codes, scales, -4 * scales


def _levels(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 scales and 8 minimums of 6 bits in 12 bytes."""
    first, second, third = packed.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), -1)
    return scales, torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), -1)


def _q4_k(data: torch.Tensor) -> _Read:
    scales, minimums = _levels(data[..., 4:16])
    codes = _planes(data[..., 16:], 32, 4)
    return 4, codes, _half(data[..., :2]) * scales, -(_half(data[..., 2:4]) * minimums)


def _q5_k(data: torch.Tensor) -> _Read:
    scales, minimums = _levels(data[..., 4:16])
    codes = _planes(data[..., 48:], 32, 4) | (_planes(data[..., 16:48], 32, 1) << 4)
    return 8, codes, _half(data[..., :2]) * scales, -(_half(data[..., 2:4]) * minimums)


def _q6_k(data: torch.Tensor) -> _Read:
    low, high, levels = data[..., :128], data[..., 128:192], data[..., 192:208]
    codes = _planes(low, 64, 4) | (_planes(high, 32, 2) << 4)
    scales = _half(data[..., 208:210]) * levels.contiguous().view(torch.int8)
    return 8, codes.to(torch.int8) - 32, scales, None


# The values of 4 bits in IQ4_NL and IQ4_XS.
_NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _non_linear(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(_NON_LINEAR, dtype=torch.int8)[codes.int()]


def _iq4_nl(data: torch.Tensor) -> _Read:
    return 8, _non_linear(_nibbles(data[..., 2:])), _half(data[..., :2]), None


def _iq4_xs(data: torch.Tensor) -> _Read:
    high, low = _planes(data[..., 2:4], 1, 2), _planes(data[..., 4:8], 1, 4)
    scales = _half(data[..., :2]) * ((low | (high << 4)).to(torch.int8) - 32)
    return 8, _non_linear(_planes(data[..., 8:], 16, 4)), scales, None


_READERS: dict[str, Callable[[torch.Tensor], _Read]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
