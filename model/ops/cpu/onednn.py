"""CPU forms of the ops on oneDNN and torch's flash attention, for where no native kernel fits.

Weights are held in oneDNN's blocked layout (1.5 to 2.4 times the speed of plain rows at decode
sizes). Paged KV is gathered once a layer with indices that are derived once a step; slots that
may not be seen gather the null block, which is always zero, so stale values never enter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.ops import reference
from model.ops.forward_batch import ForwardBatch, GroupTables

_NEG_INF = float("-inf")
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def lacks_bfloat16() -> bool:
    """Whether oneDNN takes no bfloat16 on this processor: on x86, without AVX-512."""
    mkldnn = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and not mkldnn._is_mkldnn_bf16_supported()


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A linear's weight [out, in] in the layout `linear` is fastest with; the shape stays."""
    if weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return weight
    if lacks_bfloat16():
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As reference.linear, for weights from `pack`."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def pack_experts(
    weights: torch.Tensor | reference.Mxfp4, dtype: torch.dtype
) -> Sequence[torch.Tensor]:
    """Each expert's weights from `pack`; MXFP4 becomes dense, one expert after the other."""
    if isinstance(weights, reference.Mxfp4):
        return [pack(weights[expert].dense(dtype)) for expert in range(len(weights))]
    return [pack(weight) for weight in weights]


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Sequence[torch.Tensor],
    gate_up_bias: torch.Tensor | None,
    down: Sequence[torch.Tensor],
    down_bias: torch.Tensor | None,
    limit: float | None,
    alpha: float,
) -> torch.Tensor:
    """As reference.experts: rows sorted by expert, so that each expert reads one slice."""
    top_k = chosen.shape[1]
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=len(gate_up)).tolist()
    rows = x.index_select(0, order // top_k)
    up_biases = _rows(gate_up_bias, len(counts))
    down_biases = _rows(down_bias, len(counts))
    used = [(expert, count) for expert, count in enumerate(counts) if count]
    slices = rows.split([count for _, count in used])
    inner = torch.cat(
        [
            linear(part, gate_up[expert], up_biases[expert])
            for part, (expert, _) in zip(slices, used, strict=True)
        ]
    )
    inner = reference.swiglu(inner, limit, alpha)
    slices = inner.split([count for _, count in used])
    result = torch.cat(
        [
            linear(part, down[expert], down_biases[expert])
            for part, (expert, _) in zip(slices, used, strict=True)
        ]
    )
    result = result.float() * weights.flatten()[order].unsqueeze(1)
    # Back to each token's own order, so that a sum does not depend on who else is in the batch.
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return result[back].view(*chosen.shape, -1).sum(1).to(x.dtype)


def _rows(bias: torch.Tensor | None, count: int) -> Sequence[torch.Tensor | None]:
    return [None] * count if bias is None else bias.unbind()


@dataclass
class _Single:
    """Sequences with one query token, attended in one call."""

    slots: torch.Tensor  # int64 [sequences · longest]
    mask: torch.Tensor  # [sequences, 1, 1, longest], added to the scores


@dataclass
class _Chunk:
    """One sequence with several query tokens."""

    first: int
    last: int
    slots: torch.Tensor  # int64 [seen]
    mask: torch.Tensor | None  # [1, 1, query, seen]; None: plain causal


@dataclass
class _Plan:
    single: _Single | None
    chunks: list[_Chunk]


def attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: ForwardBatch,
    group: GroupTables,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As reference.attention.

    The query heads of a KV head take the place of query positions (single tokens) or of heads
    (chunks), so KV is neither repeated nor read twice. Sinks enter through the log-sum-exp:
    softmax with one more column is softmax times sigmoid(lse - sink).
    """
    if group.plan is None:
        group.plan = _make_plan(batch, group, kv.shape[2], query.dtype)
    plan: _Plan = group.plan
    heads, head_dim = query.shape[1:]
    kv_heads = kv.shape[3]
    shared = heads // kv_heads
    keys, values = kv.flatten(3).flatten(1, 2)
    out = torch.empty_like(query)
    sinks = None if sinks is None else sinks.float().view(kv_heads, shared)
    if plan.single is not None:
        count = plan.single.mask.shape[0]
        shape = (count, -1, kv_heads, head_dim)
        mixed, lse = _flash(
            query[:count].view(count, kv_heads, shared, head_dim),
            keys.index_select(0, plan.single.slots).view(shape).transpose(1, 2),
            values.index_select(0, plan.single.slots).view(shape).transpose(1, 2),
            attn_mask=plan.single.mask.expand(-1, 1, shared, -1),
        )
        if sinks is not None:
            mixed = mixed * torch.sigmoid(lse - sinks).unsqueeze(-1).to(mixed.dtype)
        out[:count] = mixed.reshape(count, heads, head_dim)
    for chunk in plan.chunks:
        count = chunk.last - chunk.first
        shape = (-1, kv_heads, 1, head_dim)
        mixed, lse = _flash(
            query[chunk.first : chunk.last]
            .view(count, kv_heads, shared, head_dim)
            .permute(1, 2, 0, 3),
            keys.index_select(0, chunk.slots)
            .view(shape)
            .expand(-1, -1, shared, -1)
            .permute(1, 2, 0, 3),
            values.index_select(0, chunk.slots)
            .view(shape)
            .expand(-1, -1, shared, -1)
            .permute(1, 2, 0, 3),
            is_causal=chunk.mask is None,
            attn_mask=chunk.mask,
        )
        if sinks is not None:
            mixed = mixed * torch.sigmoid(lse - sinks[:, :, None]).unsqueeze(-1).to(mixed.dtype)
        out[chunk.first : chunk.last] = mixed.permute(2, 0, 1, 3).reshape(count, heads, head_dim)
    return out


def _make_plan(
    batch: ForwardBatch, group: GroupTables, block_size: int, dtype: torch.dtype
) -> _Plan:
    singles = batch.num_single
    single = None
    if singles:
        ends = torch.tensor(batch.context_lens[:singles]).unsqueeze(1)
        starts = torch.zeros_like(ends) if group.window is None else (ends - group.window).clamp(0)
        at = starts + torch.arange(int((ends - starts).max()))
        seen = at < ends
        table = group.block_table[:singles]
        blocks = table.gather(1, (at // block_size).clamp(max=table.shape[1] - 1))
        slots = torch.where(seen, blocks * block_size + at % block_size, 0)
        bias = torch.zeros(at.shape, dtype=dtype).masked_fill(~seen, _NEG_INF)
        single = _Single(slots.flatten(), bias[:, None, None])
    chunks = []
    first = singles
    for row in range(singles, len(batch.query_lens)):
        count, end = batch.query_lens[row], batch.context_lens[row]
        begin = end - count
        start = 0 if group.window is None else max(0, begin - group.window + 1)
        at = torch.arange(start, end)
        slots = group.block_table[row][at // block_size] * block_size + at % block_size
        mask: torch.Tensor | None = None
        if start < begin or (group.window is not None and group.window < end):
            age = torch.arange(begin, end).unsqueeze(1) - at
            hidden = age < 0
            if group.window is not None:
                hidden |= age >= group.window
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, _NEG_INF)
            mask = mask[None, None]
        chunks.append(_Chunk(first, first + count, slots, mask))
        first += count
    return _Plan(single, chunks)
