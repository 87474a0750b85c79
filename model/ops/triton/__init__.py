"""The ops as Triton kernels, one source for NVIDIA and AMD: torch's device type "cuda".

Matrix products of dense layers stay with torch (cuBLAS, hipBLASLt) but for few rows, and weights
are as they are for both; the kernels of experts take theirs stacked, and MXFP4 packed.
"""

import torch

from model.ops.reference import (
    Mxfp4,
    empty_cache,
    empty_weight,
    gather,
    keeps_mxfp4,
    pack,
)
from model.ops.triton.attention import attention
from model.ops.triton.experts import experts
from model.ops.triton.fused import norm_mlp, norm_qkv
from model.ops.triton.linear import linear
from model.ops.triton.mxfp4 import Words
from model.ops.triton.mxfp4 import pack as pack_mxfp4
from model.ops.triton.norm import add_rms_norm, swiglu
from model.ops.triton.rotary import rotate_and_write
from model.ops.triton.route import route
from model.ops.triton.sampling import draw

__all__ = [
    "add_rms_norm",
    "attention",
    "draw",
    "empty_cache",
    "empty_weight",
    "experts",
    "gated_linear",
    "gather",
    "keeps_mxfp4",
    "linear",
    "norm_mlp",
    "norm_qkv",
    "pack",
    "pack_experts",
    "rotate_and_write",
    "route",
]


def pack_experts(weights: torch.Tensor | Mxfp4, dtype: torch.dtype) -> torch.Tensor | Words:
    """As ops.pack_experts: stacked weights as they are, MXFP4 in words."""
    return pack_mxfp4(weights, dtype) if isinstance(weights, Mxfp4) else weights


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    limit: float | None,
    alpha: float,
) -> torch.Tensor:
    """As `reference.gated_linear`."""
    return swiglu(linear(x, weight, bias), limit, alpha)
