"""MXFP4 for training: rounding with a straight-through gradient, packing and unpacking."""

import torch
from torch import Tensor

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUP = 32  # values that share one MXFP4 scale


def _mxfp4_scale(weight: Tensor) -> Tensor:
    """Return the scale exponent of each group of `weight` [..., groups, 32].

    Values above 6 times the scale are clipped; the largest value of a group is at most 7 times it.
    """
    largest = weight.abs().amax(-1, keepdim=True).clamp_min(2.0**-100)
    return torch.ceil(torch.log2(largest / 7.0))


@torch.compile(dynamic=False)
def _rounding_error(weight: Tensor) -> Tensor:
    """Return the change that rounding to MXFP4 makes to `weight` [..., in]."""
    groups = weight.unflatten(-1, (-1, GROUP))
    unit = torch.exp2(_mxfp4_scale(groups))
    x = groups / unit
    size = x.abs()
    step = 0.5 + 0.5 * (size >= 2) + (size >= 4)
    rounded = ((x / step).round() * step).clamp(-6, 6) * unit
    return rounded.flatten(-2) - weight


def fake_mxfp4(weight: Tensor) -> Tensor:
    """Round `weight` [..., in] to MXFP4; the gradient is passed through unchanged."""
    with torch.no_grad():
        change = _rounding_error(weight)
    return weight + change


def pack_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack `weight` [..., out, in] as uint8 blocks [..., out, in/32, 16], scales [..., out, in/32].

    A byte of a block holds two values, the first in the low nibble; a scale is an exponent with
    bias 127.
    """
    groups = fake_mxfp4(weight).detach().float().unflatten(-1, (-1, GROUP))
    # Scales are computed before rounding, because rounding can reduce a group's largest value.
    exponent = _mxfp4_scale(weight.detach().float().unflatten(-1, (-1, GROUP)))
    x = groups / torch.exp2(exponent)
    table = torch.tensor(FP4_VALUES)
    code = (x.abs().unsqueeze(-1) - table).abs().argmin(-1).to(torch.uint8)
    code |= (x < 0).to(torch.uint8) << 3
    return code[..., 0::2] | (code[..., 1::2] << 4), (exponent.squeeze(-1) + 127).to(torch.uint8)


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 weight [..., out, in] of blocks and scales from `pack_mxfp4`."""
    values = torch.tensor(FP4_VALUES + tuple(-v for v in FP4_VALUES))
    code = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    return (values[code.long()] * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(-2)
