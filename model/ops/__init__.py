"""The operations of the decoder: one public function each.

`reference` holds the definitions in plain torch, with shapes; `cpu` the forms that are faster on
a CPU. A function here picks by the device its tensors are on.
"""

from collections.abc import Sequence

import torch

from model.batch import ForwardBatch, GroupTables
from model.ops import cpu, reference
from model.ops.reference import (
    dequantize_mxfp4,
    rms_norm,
    rotate,
    route,
    swiglu,
    write_kv,
)

__all__ = [
    "attention",
    "dequantize_mxfp4",
    "experts",
    "linear",
    "pack",
    "pack_experts",
    "rms_norm",
    "rotate",
    "route",
    "swiglu",
    "write_kv",
]


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A linear's weight [out, in] in the layout that `linear` is fastest with on its device."""
    return cpu.pack(weight) if weight.device.type == "cpu" else weight


def pack_experts(weights: torch.Tensor) -> torch.Tensor | Sequence[torch.Tensor]:
    """Weights [experts, out, in] in the form that `experts` is fastest with on their device."""
    if weights.device.type == "cpu":
        return [cpu.pack(weight) for weight in weights]
    return weights


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [tokens, in], weight [out, in] (plain or from `pack`), bias [out] → [tokens, out]."""
    if x.device.type == "cpu":
        return cpu.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: ForwardBatch,
    group: GroupTables,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention over paged KV; shapes in `reference.attention`."""
    if query.device.type == "cpu":
        return cpu.attention(query, kv, batch, group, sinks)
    return reference.attention(query, kv, batch, group, sinks)


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor | Sequence[torch.Tensor],
    gate_up_bias: torch.Tensor | None,
    down: torch.Tensor | Sequence[torch.Tensor],
    down_bias: torch.Tensor | None,
    limit: float | None,
    alpha: float,
) -> torch.Tensor:
    """Weighted sum of each token's experts; shapes in `reference.experts`."""
    arguments = (x, chosen, weights, gate_up, gate_up_bias, down, down_bias, limit, alpha)
    return cpu.experts(*arguments) if x.device.type == "cpu" else reference.experts(*arguments)
