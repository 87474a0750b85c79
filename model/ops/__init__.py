"""The operations of the decoder: one public function each.

`reference` holds the definitions in plain torch, with shapes; the other modules hold the forms
that are faster on a kind of device. A function here picks by the device its tensors are on.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

import torch

from model.ops import cpu, reference
from model.ops.cpu import Packed, recorder
from model.ops.cpu.bindings import KernelsError
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.reference import Mxfp4

__all__ = [
    "ExpertWeights",
    "KernelsError",
    "Mxfp4",
    "Packed",
    "Weight",
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
    "recorder",
    "rotate_and_write",
    "route",
]

Weight = torch.Tensor | Packed
"""A linear's weight [out, in]."""

ExpertWeights = torch.Tensor | Sequence[torch.Tensor] | Mxfp4 | Packed
"""[experts, out, in]: stacked, one (packed) tensor an expert, MXFP4, or a device's own form."""

_BY_DEVICE: dict[str, ModuleType] = {"cpu": cpu}


def _of(device: torch.device) -> ModuleType:
    if device.type not in _BY_DEVICE:
        _BY_DEVICE[device.type] = _find(device.type)
    return _BY_DEVICE[device.type]


def _find(kind: str) -> ModuleType:
    """The kernels for a type of device; torch's "cuda" is AMD's too, where it is built for HIP."""
    if kind == "cuda" and find_spec("triton") is not None:
        # Only here: torch for CPUs comes without Triton.
        from model.ops import triton

        return triton
    return reference


def empty_weight(
    like: torch.Tensor | Mxfp4, dtype: torch.dtype, device: torch.device, parts: int = 1
) -> torch.Tensor | Mxfp4 | Packed:
    """Storage for a weight [out, in] or experts [experts, out, in], to be filled by rows.

    Filled as a tensor is, `weight[first:last].copy_(source)`, and then brought into its final form
    by `pack` or `pack_experts`. parts: how many equal parts of the outputs are used together, as
    gate and up are.
    """
    empty: torch.Tensor | Mxfp4 | Packed = _of(device).empty_weight(like, dtype, device, parts)
    return empty


def pack(weight: Weight) -> Weight:
    """A filled weight [out, in] in the form that `linear` is fastest with on its device."""
    packed: Weight = _of(weight.device).pack(weight)
    return packed


def pack_experts(weights: torch.Tensor | Mxfp4 | Packed, dtype: torch.dtype) -> ExpertWeights:
    """Filled weights [experts, out, in] in the form that `experts` is fastest with.

    dtype is that of the activations; MXFP4 becomes dense where no kernel reads it packed.
    """
    packed: ExpertWeights = _of(weights.device).pack_experts(weights, dtype)
    return packed


def empty_cache(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for KV blocks. Raises torch.OutOfMemoryError, MemoryError."""
    cache: torch.Tensor = _of(device).empty_cache(shape, dtype, device)
    return cache


def gather(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """table [rows, size], ids int64 [tokens], all of them rows → [tokens, size]."""
    out: torch.Tensor = _of(table.device).gather(table, ids)
    return out


def keeps_mxfp4(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether MXFP4 experts stay packed on the device; else they become dense as they load."""
    keeps: bool = _of(device).keeps_mxfp4(dtype)
    return keeps


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [tokens, in], weight [out, in] (plain or from `pack`), bias [out] → [tokens, out]."""
    out: torch.Tensor = _of(x.device).linear(x, weight, bias)
    return out


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and delta [tokens, size] → (their sum, its RMSNorm); without a delta the sum is x."""
    summed, normed = _of(x.device).add_rms_norm(x, delta, weight, eps)
    return summed, normed


def norm_qkv(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    weight: Weight,
    bias: torch.Tensor | None,
    cos_sin: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`add_rms_norm`, `linear` and `rotate_and_write` → (the sum, the query), if that is faster.

    None where nothing does them together faster: then they are to be done in steps.
    """
    found: tuple[torch.Tensor, torch.Tensor] | None = _of(x.device).norm_qkv(
        x, delta, norm, eps, weight, bias, cos_sin, kv, slots, heads, norms
    )
    return found


def norm_mlp(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    gate_up: Weight,
    gate_up_bias: torch.Tensor | None,
    down: Weight,
    down_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`add_rms_norm`, then plain `gated_linear` and `linear`; → (the sum, the MLP), as norm_qkv."""
    found: tuple[torch.Tensor, torch.Tensor] | None = _of(x.device).norm_mlp(
        x, delta, norm, eps, gate_up, gate_up_bias, down, down_bias
    )
    return found


def rotate_and_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """QK norms, rotary and the write to the KV cache; shapes in `reference.rotate_and_write`."""
    query: torch.Tensor = _of(qkv.device).rotate_and_write(
        qkv, cos_sin, kv, slots, heads, norms, eps
    )
    return query


def attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: ForwardBatch,
    group: GroupTables,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention over paged KV; shapes in `reference.attention`."""
    out: torch.Tensor = _of(query.device).attention(query, kv, batch, group, sinks)
    return out


def gated_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    limit: float | None,
    alpha: float,
) -> torch.Tensor:
    """x [tokens, in] → SwiGLU of its gates and ups [tokens, size]; forms in `reference.swiglu`."""
    out: torch.Tensor = _of(x.device).gated_linear(x, weight, bias, limit, alpha)
    return out


def route(
    logits: torch.Tensor, top_k: int, softmax_after_top_k: bool, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [tokens, experts] → (experts, weights), both [tokens, top_k]."""
    chosen, weights = _of(logits.device).route(logits, top_k, softmax_after_top_k, normalize)
    return chosen, weights


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertWeights,
    gate_up_bias: torch.Tensor | None,
    down: ExpertWeights,
    down_bias: torch.Tensor | None,
    limit: float | None,
    alpha: float,
    part: tuple[int, int] = (0, 1),
) -> torch.Tensor:
    """Weighted sum of each token's experts; shapes in `reference.experts`.

    part: these are so many-th, counted from 0, of so many equal parts of the experts that `chosen`
    counts, and the result is theirs.
    """
    out: torch.Tensor = _of(x.device).experts(
        x, chosen, weights, gate_up, gate_up_bias, down, down_bias, limit, alpha, part
    )
    return out


def draw(
    logits: torch.Tensor,
    heat: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """A token of each row of logits [rows, vocab] by top-k and top-p; as `reference.draw`."""
    tokens: torch.Tensor = _of(logits.device).draw(logits, heat, top_k, top_p, uniform)
    return tokens
