"""The ops as Triton kernels, one source for NVIDIA and AMD: torch's device type "cuda".

Matrix products of dense layers stay with torch (cuBLAS, hipBLASLt).
"""

import torch
import torch.nn.functional as F

from model.ops.reference import ExpertWeights, Mxfp4
from model.ops.triton.attention import attention
from model.ops.triton.experts import experts
from model.ops.triton.norm import add_rms_norm, swiglu
from model.ops.triton.rotary import rotate_and_write
from model.ops.triton.route import route

__all__ = [
    "add_rms_norm",
    "attention",
    "experts",
    "linear",
    "pack",
    "pack_experts",
    "rotate_and_write",
    "route",
    "swiglu",
]


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The weight as it is: torch's libraries take it so."""
    return weight


def pack_experts(weights: torch.Tensor | Mxfp4, dtype: torch.dtype) -> ExpertWeights:
    """The weights as they are: kernels read them stacked, and MXFP4 packed."""
    return weights


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `reference.linear`."""
    return F.linear(x, weight, bias)
