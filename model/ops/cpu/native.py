"""The operations of the native kernels, on contiguous tensors.

The residual stream, the weights of norms and logits are float32, the rest is bfloat16.
"""

import ctypes
import math

import torch

from model.ops.cpu.bindings import kernels
from model.ops.cpu.packed import Packed
from model.ops.cpu.recorder import empty
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.specs import (
    Activation,
    AttentionSpec,
    ExpertGroups,
    Experts,
    HeadLinear,
    Norm,
    RopeArgs,
    RouterSpec,
)

MAX_HEAD_DIM = 576
MAX_GROUP = 32  # query heads of a KV head
KV_FORMS = {torch.bfloat16: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
"""The dtypes of KV caches that the kernels take, numbered as in kernels/kv_vector.h."""


def embed(table: torch.Tensor, ids: torch.Tensor, scale: float, first: int) -> torch.Tensor:
    """As Backend.embed."""
    out = empty((len(ids), table.shape[1]), torch.float32)
    kernels.embed(
        table.data_ptr(), *table.shape, first, ids.data_ptr(), len(ids), scale, out.data_ptr()
    )
    return out


def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x of any shape → x · factor, rounded once, as torch computes it."""
    out = empty(tuple(x.shape), x.dtype)
    kernels.scale(x.data_ptr(), factor, x.numel(), out.data_ptr(), torch.get_num_threads())
    return out


def linear(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """As Backend.linear."""
    out = empty((x.shape[0], weight.shape[0]), x.dtype)
    kernels.linear(
        weight.described(bias), x.data_ptr(), x.shape[0], out.data_ptr(), torch.get_num_threads()
    )
    return out


def logits(
    x: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As Backend.logits; out: contiguous."""
    if out is None:
        out = empty((x.shape[0], weight.shape[0]), torch.float32)
    kernels.logits(
        weight.described(bias), x.data_ptr(), x.shape[0], scale, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """As Backend.add_rms_norm, for a size that is a multiple of 16."""
    normed = empty(x.shape, torch.bfloat16)
    summed = x if delta is None else empty(x.shape, x.dtype)
    kernels.add_rms_norm(
        x.data_ptr(), None if delta is None else delta.data_ptr(),
        None if norm.is_identity else norm.weight.data_ptr(), *x.shape, norm.eps, summed.data_ptr(),
        normed.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return summed, normed


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As Backend.rms_norm, for a size that is a multiple of 16."""
    out = empty(x.shape, x.dtype)
    kernels.rms_norm(
        x.data_ptr(), weight.data_ptr(), *x.shape, eps, out.data_ptr(), torch.get_num_threads()
    )
    return out


def scaled_sum(x: torch.Tensor, delta: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """As Backend.scaled_sum."""
    out = empty(x.shape, x.dtype)
    kernels.scaled_sum(
        x.data_ptr(), delta.data_ptr(), factor.data_ptr(), x.numel(), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """As Backend.gated, for a size that is a multiple of 16."""
    out = empty(gate.shape, gate.dtype)
    kernels.gated(
        gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), *gate.shape,
        *_activation(activation), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """As Backend.softcap."""
    kernels.softcap(x.data_ptr(), cap, x.numel(), torch.get_num_threads())
    return x


def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As Backend.argmax."""
    rows, vocab = logits.shape
    highest, tokens = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    kernels.argmax(
        logits.data_ptr(), rows, vocab, highest.data_ptr(), tokens.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return highest, tokens


def rotate_and_write(qkv: torch.Tensor, rope: RopeArgs) -> torch.Tensor:
    """As Backend.rotate_and_write, for head_dim and rotary_dim that are multiples of 32."""
    tokens, _, head_dim = qkv.shape
    heads, kv = rope.heads, rope.kv
    query = empty((tokens, heads.heads, head_dim), qkv.dtype)
    q_norm, k_norm = (
        None if norm is None else norm.weight.data_ptr() for norm in (heads.q_norm, heads.k_norm)
    )
    kernels.rotate_and_write(
        qkv.data_ptr(), rope.cos_sin.data_ptr(), kv.data_ptr(), KV_FORMS[kv.dtype],
        _stride_bytes(kv, 0), kv.shape[2], _stride_bytes(kv, 1), rope.slot_mapping.data_ptr(),
        q_norm, k_norm, heads.has_whole_norms, heads.rotates_before_norm, heads.norms_values,
        heads.values_are_keys, 0.0 if heads.q_norm is None else heads.q_norm.eps,
        None if rope.query_scale is None else rope.query_scale.data_ptr(), tokens, heads.heads,
        heads.kv_heads, head_dim, rope.cos_sin.shape[1], query.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return query


def attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: ForwardBatch,
    group: GroupTables,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As Backend.attention, for a head_dim that is a multiple of 32; reads the blocks in place.

    All values of a latent are summed, though the last ones are not asked for.
    """
    out = empty(query.shape, query.dtype)
    _, heads, head_dim = query.shape
    table, is_latent = group.block_table, spec.latent_dim is not None
    kv_heads = heads // _largest_divisor(heads, MAX_GROUP) if is_latent else kv.shape[3]
    kernels.attention(
        query.data_ptr(), kv.data_ptr(), KV_FORMS[kv.dtype],
        0 if is_latent else _stride_bytes(kv, 0), table.data_ptr(), table.stride(0),
        batch.cu_seqlens_q.data_ptr(), batch.context_lens.data_ptr(),
        None if sinks is None else sinks.data_ptr(), table.shape[0], heads, kv_heads, kv.shape[3],
        head_dim, kv.shape[2], _stride_bytes(kv, 1), _score_scale(spec, head_dim),
        spec.softcap or 0.0, spec.window or 0, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out[..., : spec.latent_dim] if is_latent else out


def _stride_bytes(tensor: torch.Tensor, dim: int) -> int:
    return tensor.stride(dim) * tensor.element_size()


def _largest_divisor(count: int, limit: int) -> int:
    return next(n for n in range(min(count, limit), 0, -1) if count % n == 0)


def head_linear(x: torch.Tensor, linear: HeadLinear) -> torch.Tensor:
    """As Backend.head_linear, for weights in the layout of the kernels."""
    out = empty((x.shape[0], linear.heads, linear.outputs), x.dtype)
    _head_linear(x, linear, out)
    return out


def _head_linear(x: torch.Tensor, linear: HeadLinear, out: torch.Tensor) -> None:
    kernels.head_linear(
        linear.weight.described(None), linear.heads, x.data_ptr(), x.shape[0], x.stride(0),
        x.stride(1), out.data_ptr(), out.stride(0), out.stride(1), torch.get_num_threads(),
    )  # fmt: skip


def latent_query(
    query: torch.Tensor, latent: torch.Tensor, norm: Norm, absorb: HeadLinear, rope: RopeArgs
) -> torch.Tensor:
    """As Backend.latent_query, for a rank and rotary_dim that are multiples of 32."""
    (tokens, heads, _), rotary = query.shape, rope.cos_sin.shape[1]
    out = empty((tokens, heads, norm.size + rotary), query.dtype)
    kernels.write_latents(
        query.data_ptr(), latent.data_ptr(), norm.weight.data_ptr(), norm.eps,
        rope.cos_sin.data_ptr(), rope.kv.data_ptr(), KV_FORMS[rope.kv.dtype], rope.kv.shape[2],
        _stride_bytes(rope.kv, 1), rope.slot_mapping.data_ptr(), tokens, heads, absorb.inputs,
        norm.size, rotary, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    _head_linear(query, absorb, out)
    return out


def _score_scale(spec: AttentionSpec, head_dim: int) -> float:
    """The scale of the scores; the usual 1 / √head_dim with the square root rounded to float32.

    head_dim**-0.5 rounds to another float32 for a head_dim of 96. Models with the usual scale keep
    the results that they had when the kernels computed it.
    """
    if spec.scale == head_dim**-0.5:
        return 1 / ctypes.c_float(math.sqrt(head_dim)).value
    return spec.scale


def _activation(activation: Activation) -> tuple[int, float, float]:
    """The kind, limit and alpha of an activation, as in kernels/types.h."""
    kinds = {"silu": int(activation.limit is not None), "gelu_tanh": 2, "relu": 3}
    return kinds[activation.kind], activation.limit or 0.0, activation.alpha


def gated_linear(
    x: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """As Backend.gated_linear, for a number of outputs that is a multiple of 64."""
    out = empty((x.shape[0], weight.shape[0] // 2), x.dtype)
    kernels.gated_linear(
        weight.described(bias), x.data_ptr(), x.shape[0], *_activation(activation),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def route(
    logits: torch.Tensor, router: RouterSpec, correction: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As Backend.route."""
    (rows, count), top_k = logits.shape, router.top_k
    expert_ids = empty((rows, top_k), torch.int64)
    weights = empty((rows, top_k), torch.float32)
    groups = router.groups or ExpertGroups(1, 1, 1)
    kernels.route(
        logits.data_ptr(), None if correction is None else correction.data_ptr(), rows, count,
        top_k, router.softmax_after_top_k, router.normalize, router.sigmoid, groups.count,
        groups.chosen, groups.best, router.scale, router.scales_experts, expert_ids.data_ptr(),
        weights.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return expert_ids, weights


def add_gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """As Backend.add_gated, for a size that is a multiple of 16."""
    out = empty(y.shape, y.dtype)
    kernels.add_gated(
        x.data_ptr(), y.data_ptr(), None if gate is None else gate.data_ptr(), *y.shape,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def experts(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    activation: Activation,
) -> torch.Tensor:
    """As Backend.experts; the results of a token's experts are added in the experts' order."""
    tokens, top_k = expert_ids.shape
    out = empty((tokens, experts.hidden), x.dtype)
    kernels.experts(
        experts.gate_up.described(experts.gate_up_bias),
        experts.down.described(experts.down_bias), experts.count, x.data_ptr(), tokens,
        expert_ids.data_ptr(), weights.data_ptr(), top_k, *_activation(activation),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def gather(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """As Backend.gather, of any dtype."""
    out = empty((len(ids), table.shape[1]), table.dtype)
    kernels.gather(
        table.data_ptr(), table.shape[1] * table.element_size(), ids.data_ptr(), len(ids),
        out.data_ptr(),
    )  # fmt: skip
    return out
