"""Launches of the mixture-of-experts MLP: sort by expert, gate and up, down, weighted sum."""

from functools import partial
from typing import Any

import torch
import triton

from model.ops.specs import Activation, Experts, ExpertShard
from model.ops.triton.kernels.experts_down import experts_down, sum_experts
from model.ops.triton.kernels.experts_gate_up import experts_gate_up
from model.ops.triton.mxfp4 import ExpertWeights
from model.ops.triton.norm import activate
from model.ops.triton.quantized.linear import Pairs, quantized_down, quantized_gate_up
from model.ops.triton.quantized.weights import QuantizedWeight
from model.ops.triton.sort_by_expert import sort_by_expert
from model.ops.triton.tiles import Target, Tile, chosen_tile, for_dtype, row_blocks


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    activation: Activation,
    shard: ExpertShard,
    target: Target,
) -> torch.Tensor:
    """As `Backend.experts`, for weights as `mxfp4.ExpertWeights` or `QuantizedWeight`."""
    x, chosen = x.contiguous(), chosen.contiguous()
    if not len(x):
        return torch.empty_like(x)
    first = shard.rank * experts.count
    order, expert_starts = sort_by_expert(chosen, first, experts.count, target)
    pairs = expert_pairs(x, weights, order, expert_starts, experts, activation, shard.size, target)
    return sum_pairs(pairs, chosen, first, experts.count, target)


def sum_pairs(
    pairs: torch.Tensor, chosen: torch.Tensor, first: int, experts: int, target: Target
) -> torch.Tensor:
    """pairs [tokens, top_k, hidden] → sums [tokens, hidden] for the experts from `first` on.

    chosen [tokens, top_k]: the expert of each pair; those of other experts are not read.
    """
    tokens, top_k, hidden = pairs.shape
    out, block = pairs.new_empty(tokens, hidden), min(1024, triton.next_power_of_2(hidden))
    sum_experts[(tokens, triton.cdiv(hidden, block))](
        pairs,
        chosen,
        out,
        first,
        TOP_K=top_k,
        EXPERTS=experts,
        HIDDEN=hidden,
        BLOCK=block,
        num_warps=4,
        **target.launch_options,
    )
    return out


def expert_pairs(
    x: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    expert_starts: torch.Tensor,
    experts: Experts,
    activation: Activation,
    shards: int,
    target: Target,
) -> torch.Tensor:
    """x [tokens, hidden], weights [tokens, top_k] → each pair's result times its weight.

    order and expert_starts as from `sort_by_expert` → [tokens, top_k, hidden], not initialised for
    pairs whose experts another of the `shards` holds.
    """
    gate_up, down = experts.gate_up, experts.down
    gate_up_bias, down_bias = experts.gate_up_bias, experts.down_bias
    (tokens, hidden), (_, top_k) = x.shape, weights.shape
    count, size, tiles = experts.count, experts.size, target.tiles
    mean_rows = tokens * top_k / (count * shards)

    def launch(
        weights: ExpertWeights, columns: int, packed: tuple[Tile, ...]
    ) -> tuple[tuple[int, int], dict[str, Any]]:
        choices = packed if weights.is_packed else tiles.experts
        blocks = partial(row_blocks, tokens * top_k, count)
        tile = chosen_tile(choices, mean_rows, blocks, columns, target.processors)
        tile = for_dtype(tile, x.dtype)
        grid = triton.cdiv(columns, tile.n), row_blocks(tokens * top_k, count, tile.m)
        return grid, {
            "EXPERTS": count,
            "BLOCK_E": triton.next_power_of_2(count),
            "HIDDEN": hidden,
            "SIZE": size,
            "ROW": weights.row,
            "BLOCK_M": tile.m,
            "SHORT": tiles.short if tiles.short < tile.m else 0,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
            "RUN": weights.run,
            "VENDOR": target.vendor,
            **tile.options,
            **target.launch_options,
        }

    sorted_pairs = Pairs(order, expert_starts, weights, mean_rows)
    if isinstance(gate_up, QuantizedWeight):
        both = quantized_gate_up(x, gate_up, gate_up_bias, sorted_pairs, target)
        inner = activate(both, activation, target)
    else:
        inner = x.new_empty(tokens * top_k, size)
        grid, options = launch(gate_up, size, tiles.mxfp4_gate_up)
        experts_gate_up[grid](
            x,
            gate_up.values,
            gate_up.scales,
            x if gate_up_bias is None else gate_up_bias,
            order,
            expert_starts,
            inner,
            TOP_K=top_k,
            BIAS=gate_up_bias is not None,
            LIMIT=activation.limit,
            ALPHA=activation.alpha,
            **options,
        )
    if isinstance(down, QuantizedWeight):
        return quantized_down(inner, down, down_bias, sorted_pairs, target)
    pairs = x.new_empty(tokens, top_k, hidden)
    grid, options = launch(down, hidden, tiles.mxfp4_down)
    experts_down[grid](
        inner,
        down.values,
        down.scales,
        x if down_bias is None else down_bias,
        weights.contiguous(),
        order,
        expert_starts,
        pairs,
        BIAS=down_bias is not None,
        **options,
    )
    return pairs
