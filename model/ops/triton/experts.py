"""Launches of the mixture-of-experts MLP: sort by expert, gate and up, down, weighted sum."""

from typing import Any

import torch
import triton

from model.ops.specs import Activation, Experts, ExpertShard
from model.ops.triton.kernels.experts import experts_down, experts_gate_up, sum_experts
from model.ops.triton.sort_by_expert import sort_by_expert
from model.ops.triton.tiles import Target, Tile, for_dtype


def row_blocks(pairs: int, experts: int, height: int) -> int:
    """Return the maximum number of blocks of `height` rows that pairs of these experts can need."""
    used = min(pairs, experts)
    return used + (pairs - used) // height


def _tile(target: Target, dtype: torch.dtype, mean_rows: float, packed: bool) -> Tile:
    """Return the smallest tile with room for the mean number of rows of an expert."""
    choices = target.tiles.mxfp4 if packed else target.tiles.experts
    fitting = [tile for tile in choices if tile.m >= mean_rows]
    return for_dtype(fitting[0] if fitting else choices[-1], dtype)


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    activation: Activation,
    shard: ExpertShard,
    target: Target,
) -> torch.Tensor:
    """As `Backend.experts`, for weights as `mxfp4.ExpertWeights`."""
    gate_up, down = experts.gate_up, experts.down
    gate_up_bias, down_bias = experts.gate_up_bias, experts.down_bias
    x, chosen = x.contiguous(), chosen.contiguous()
    (tokens, hidden), (_, top_k) = x.shape, chosen.shape
    if not tokens:
        return torch.empty_like(x)
    count, size, packed = experts.count, experts.size, down.is_packed
    pairs = tokens * top_k
    tile = _tile(target, x.dtype, pairs / (count * shard.size), packed)
    first = shard.rank * count
    order, expert_starts = sort_by_expert(chosen, first, count, target)
    shared: dict[str, Any] = {
        "EXPERTS": count,
        "BLOCK_E": triton.next_power_of_2(count),
        "HIDDEN": hidden,
        "SIZE": size,
        "BLOCK_M": tile.m,
        "SHORT": min(target.tiles.short or tile.m, tile.m),
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "VENDOR": target.vendor,
        **tile.options,
        **target.launch_options,
    }
    blocks = row_blocks(pairs, count, tile.m)
    inner = x.new_empty(pairs, size)
    experts_gate_up[(triton.cdiv(size, tile.n), blocks)](
        x,
        gate_up.values,
        gate_up.scales,
        x if gate_up_bias is None else gate_up_bias,
        order,
        expert_starts,
        inner,
        TOP_K=top_k,
        PACKED=gate_up.is_packed,
        BIAS=gate_up_bias is not None,
        LIMIT=activation.limit,
        ALPHA=activation.alpha,
        **shared,
    )
    parts = x.new_empty(pairs, hidden)
    # A stage loads half as much as in gate and up; twice the stages keep as much in flight.
    experts_down[(triton.cdiv(hidden, tile.n), blocks)](
        inner,
        down.values,
        down.scales,
        x if down_bias is None else down_bias,
        weights.contiguous(),
        order,
        expert_starts,
        parts,
        PACKED=packed,
        BIAS=down_bias is not None,
        **{**shared, "num_stages": 2 * (tile.stages - 1) if packed else tile.stages},
    )
    out = torch.empty_like(x)
    block = min(1024, triton.next_power_of_2(hidden))
    sum_experts[(tokens, triton.cdiv(hidden, block))](
        parts,
        chosen,
        out,
        first,
        TOP_K=top_k,
        EXPERTS=count,
        HIDDEN=hidden,
        BLOCK=block,
        num_warps=4,
        **target.launch_options,
    )
    return out
