"""The ops that `kernels.cpp` does, on bfloat16 tensors that are contiguous."""

import torch

from model.ops.cpu.bindings import call, empty
from model.ops.cpu.packed import Packed
from model.ops.forward_batch import ForwardBatch, GroupTables

MAX_HEAD_DIM = 256
MAX_GROUP = 32  # query heads of a KV head


def linear(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """As reference.linear."""
    out = empty((x.shape[0], weight.shape[0]), x.dtype)
    call(
        "linear",
        weight.described(bias),
        x.data_ptr(),
        x.shape[0],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.add_rms_norm, for a size that 16 divides."""
    normed = empty(x.shape, x.dtype)
    summed = x if delta is None else empty(x.shape, x.dtype)
    call(
        "add_rms_norm",
        x.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(), *x.shape,
        eps, summed.data_ptr(), normed.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return summed, normed


def rotate_and_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """As reference.rotate_and_write, for heads whose size 32 divides."""
    tokens, _, head_dim = qkv.shape
    query = empty((tokens, heads, head_dim), qkv.dtype)
    q_norm, k_norm = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
    call(
        "rotate_and_write",
        qkv.data_ptr(), cos_sin.data_ptr(), kv.data_ptr(), kv.stride(0), slots.data_ptr(),
        q_norm, k_norm, eps, tokens, heads, kv.shape[3], head_dim, query.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return query


def attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: ForwardBatch,
    group: GroupTables,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As reference.attention, for heads whose size 32 divides; reads the pages where they are."""
    out = empty(query.shape, query.dtype)
    _, heads, head_dim = query.shape
    table = group.block_table
    call(
        "attention",
        query.data_ptr(), kv.data_ptr(), kv.stride(0), table.data_ptr(), table.stride(0),
        batch.query_starts.data_ptr(), batch.seen.data_ptr(),
        None if sinks is None else sinks.data_ptr(), table.shape[0], heads, kv.shape[3], head_dim,
        kv.shape[2], group.window or 0, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def gated_linear(
    x: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    limit: float | None,
    alpha: float,
) -> torch.Tensor:
    """As reference.gated_linear, for a size that 32 divides."""
    out = empty((x.shape[0], weight.shape[0] // 2), x.dtype)
    call(
        "gated_linear",
        weight.described(bias), x.data_ptr(), x.shape[0], limit is not None, limit or 0.0, alpha,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def route(
    logits: torch.Tensor, top_k: int, softmax_after_top_k: bool, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.route."""
    rows, count = logits.shape
    chosen = empty((rows, top_k), torch.int64)
    weights = empty((rows, top_k), torch.float32)
    call(
        "route",
        logits.data_ptr(), rows, count, top_k, softmax_after_top_k, normalize, chosen.data_ptr(),
        weights.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return chosen, weights


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Packed,
    gate_up_bias: torch.Tensor | None,
    down: Packed,
    down_bias: torch.Tensor | None,
    limit: float | None,
    alpha: float,
) -> torch.Tensor:
    """As reference.experts; a token's experts are added in their order."""
    tokens, top_k = chosen.shape
    out = empty((tokens, down.shape[1]), x.dtype)
    call(
        "experts",
        gate_up.described(gate_up_bias), down.described(down_bias), len(down), x.data_ptr(),
        tokens, chosen.data_ptr(), weights.data_ptr(), top_k, limit is not None, limit or 0.0,
        alpha, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def gather(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """As reference.gather, of any dtype."""
    out = empty((len(ids), table.shape[1]), table.dtype)
    call(
        "gather", table.data_ptr(), table.shape[1] * table.element_size(), ids.data_ptr(),
        len(ids), out.data_ptr(),
    )  # fmt: skip
    return out
