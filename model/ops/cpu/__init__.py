"""The ops on a CPU: native kernels for bfloat16 where they were built, torch for the rest."""

from collections.abc import Sequence
from types import ModuleType

import torch

from model.ops import reference
from model.ops.cpu import huge_pages as pages
from model.ops.cpu import native
from model.ops.cpu import onednn as plain
from model.ops.cpu.bindings import Recorder, leave_to_torch, library
from model.ops.cpu.packed import PANEL, Packed
from model.ops.cpu.sampling import draw as draw
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.reference import MXFP4_BLOCK, Mxfp4
from model.ops.reference import norm_mlp as norm_mlp
from model.ops.reference import norm_qkv as norm_qkv


def _native(x: torch.Tensor, *multiples: tuple[int, int]) -> bool:
    """Whether the kernels take bfloat16 of these sizes, each with what must divide it."""
    return (
        x.dtype == torch.bfloat16
        and not any(size % unit for size, unit in multiples)
        and library() is not None
    )


def _torch(module: ModuleType) -> ModuleType:
    leave_to_torch()
    return module


def empty_weight(
    like: torch.Tensor | Mxfp4, dtype: torch.dtype, device: torch.device, parts: int
) -> torch.Tensor | Mxfp4 | Packed:
    """As ops.empty_weight."""
    *stack, outputs, inputs = like.shape
    fits = dtype == torch.bfloat16 and not inputs % MXFP4_BLOCK
    if stack:  # experts, whose outputs are taken panel by panel
        fits = fits and not outputs % (parts * PANEL)
    if fits and library() is not None:
        return Packed.empty(like.shape, isinstance(like, Mxfp4))
    return reference.empty_weight(like, dtype, device, parts)


def pack(weight: torch.Tensor | Packed) -> torch.Tensor | Packed:
    """As ops.pack."""
    if isinstance(weight, Packed):
        return weight
    if _native(weight, (weight.shape[1], MXFP4_BLOCK)):
        packed = Packed.empty(weight.shape, False)
        packed.copy_(weight)
        return packed
    return plain.pack(weight)


def pack_experts(
    weights: torch.Tensor | Mxfp4 | Packed, dtype: torch.dtype
) -> Sequence[torch.Tensor] | Packed:
    """As ops.pack_experts."""
    return weights if isinstance(weights, Packed) else plain.pack_experts(weights, dtype)


def keeps_mxfp4(dtype: torch.dtype) -> bool:
    """As ops.keeps_mxfp4."""
    return dtype == torch.bfloat16 and library() is not None


def empty_cache(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As ops.empty_cache: pages that nobody touches cost nothing."""
    return pages.empty(shape, dtype)


def recorder(dtype: torch.dtype) -> Recorder | None:
    """What records computations of this dtype to be done again; None where it cannot be."""
    return Recorder() if dtype == torch.bfloat16 and library() is not None else None


def gather(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """As reference.gather."""
    which = native if library() is not None and table.is_contiguous() else _torch(reference)
    return which.gather(table, ids)


def linear(
    x: torch.Tensor, weight: torch.Tensor | Packed, bias: torch.Tensor | None
) -> torch.Tensor:
    """As reference.linear."""
    if isinstance(weight, Packed):
        return native.linear(x, weight, bias)
    return _torch(plain).linear(x, weight, bias)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.add_rms_norm."""
    which = native if _native(x, (x.shape[1], 16)) else _torch(reference)
    return which.add_rms_norm(x, delta, weight, eps)


def rotate_and_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """As reference.rotate_and_write."""
    which = native if _native(qkv, (qkv.shape[2], 32)) else _torch(reference)
    return which.rotate_and_write(qkv, cos_sin, kv, slots, heads, norms, eps)


def attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: ForwardBatch,
    group: GroupTables,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As reference.attention."""
    _, heads, head_dim = query.shape
    fits = heads // kv.shape[3] <= native.MAX_GROUP and head_dim <= native.MAX_HEAD_DIM
    fits = fits and _native(query, (head_dim, 32))
    return (native if fits else _torch(plain)).attention(query, kv, batch, group, sinks)


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Packed,
    bias: torch.Tensor | None,
    limit: float | None,
    alpha: float,
) -> torch.Tensor:
    """As reference.gated_linear."""
    if not isinstance(weight, Packed):
        return _torch(reference).swiglu(plain.linear(x, weight, bias), limit, alpha)
    if weight.shape[0] % (2 * PANEL):
        return _torch(reference).swiglu(native.linear(x, weight, bias), limit, alpha)
    return native.gated_linear(x, weight, bias, limit, alpha)


def route(
    logits: torch.Tensor, top_k: int, softmax_after_top_k: bool, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.route."""
    which = native if _native(logits) else _torch(reference)
    return which.route(logits, top_k, softmax_after_top_k, normalize)


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Sequence[torch.Tensor] | Packed,
    gate_up_bias: torch.Tensor | None,
    down: Sequence[torch.Tensor] | Packed,
    down_bias: torch.Tensor | None,
    limit: float | None,
    alpha: float,
    part: tuple[int, int] = (0, 1),
) -> torch.Tensor:
    """As reference.experts."""
    if part[1] > 1:
        # As a batch in which every token has one expert: those of the tokens that have one here.
        own = chosen - part[0] * len(gate_up)
        token, rank = torch.where((own >= 0) & (own < len(gate_up)))
        parts = x.new_zeros(*chosen.shape, x.shape[1])
        if len(token):
            one, share = own[token, rank].unsqueeze(1), weights[token, rank].unsqueeze(1)
            rest = gate_up, gate_up_bias, down, down_bias, limit, alpha
            parts[token, rank] = experts(x[token], one, share, *rest)
        return parts.sum(1, dtype=torch.float32).to(x.dtype)
    if isinstance(gate_up, Packed) and isinstance(down, Packed):
        return native.experts(
            x, chosen, weights, gate_up, gate_up_bias, down, down_bias, limit, alpha
        )
    assert not isinstance(gate_up, Packed)  # both are, or neither
    assert not isinstance(down, Packed)
    return _torch(plain).experts(
        x, chosen, weights, gate_up, gate_up_bias, down, down_bias, limit, alpha
    )
