"""Launches of products with weights of 4 and 8 bits: linears and experts."""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton

from model.ops.triton.quantized.product import quantize_rows, quantized_product
from model.ops.triton.quantized.weights import QuantizedWeight
from model.ops.triton.tiles import Target, Tile, chosen_tile, for_dtype, row_blocks


class Pairs(NamedTuple):
    """The (token, expert) pairs of a step, sorted by expert as `sort_by_expert` returns them."""

    order: torch.Tensor
    expert_starts: torch.Tensor
    weights: torch.Tensor  # float32 [tokens, top_k]
    mean_rows: float  # of an expert of this rank


def quantized_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    target: Target,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [rows, in] → x · weightᵀ + bias [rows, out]; `out`, of any dtype, if it is given."""
    out = x.new_empty(len(x), weight.shape[0]) if out is None else out
    return _product(x, weight, bias, out, target)


def quantized_gate_up(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    pairs: Pairs,
    target: Target,
) -> torch.Tensor:
    """x [tokens, in], weight [experts, out, in], bias [experts, out] → [sorted pairs, out]."""
    out = x.new_empty(pairs.weights.numel(), weight.shape[1])
    return _product(x, weight, bias, out, target, pairs, pairs.weights.shape[1])


def quantized_down(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    pairs: Pairs,
    target: Target,
) -> torch.Tensor:
    """x [sorted pairs, in] → each pair's result times its weight [tokens, top_k, out]."""
    out = x.new_empty(*pairs.weights.shape, weight.shape[1])
    return _product(x, weight, bias, out, target, pairs)


def _product(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    target: Target,
    pairs: Pairs | None = None,
    top_k: int = 0,
) -> torch.Tensor:
    """Launch the product; pairs: of experts, with a row of x for each `top_k` of them, or one."""
    *stack, outputs, inputs = weight.shape
    count, rows = stack[0] if stack else 0, len(x)
    if not rows:
        return out
    dtype, x, scales = x.dtype, x.contiguous(), x
    if weight.kind == "fp8x8":
        x, scales = quantized_rows(x, weight, target)
    tile, blocks = _tile(weight, rows, dtype, target, pairs)
    order, expert_starts, router_weights = pairs[:3] if pairs is not None else (x, x, x)
    quantized_product[(blocks, triton.cdiv(outputs, tile.n))](
        x,
        scales,
        weight.codes,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.scales if bias is None else bias,
        order,
        expert_starts,
        router_weights.contiguous(),
        out,
        rows,
        OUT=outputs,
        IN=inputs,
        GROUP=weight.group,
        X_SCALES=scales.shape[1] if weight.kind == "fp8x8" else 0,
        EXPERTS=count,
        BLOCK_E=triton.next_power_of_2(max(1, count)),
        TOP_K=top_k,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        KIND=weight.kind,
        ZEROS=weight.zeros is not None,
        RUN=weight.run,
        BIAS=bias is not None,
        VENDOR=target.vendor,
        **tile.options,
        **target.launch_options,
    )
    return out


def _tile(
    weight: QuantizedWeight, rows: int, dtype: torch.dtype, target: Target, pairs: Pairs | None
) -> tuple[Tile, int]:
    """Return the tile of a product, and its row blocks; rows: of x."""
    *stack, outputs, _ = weight.shape
    choices = target.tiles.fp8 if weight.kind == "fp8x8" else target.tiles.quantized

    def blocks(height: int) -> int:
        if pairs is None:
            return triton.cdiv(rows, height)
        return row_blocks(pairs.weights.numel(), stack[0], height)

    mean_rows = rows if pairs is None else pairs.mean_rows
    tile = chosen_tile(choices, mean_rows, blocks, outputs, target.processors)
    if weight.kind != "fp8x8":
        tile = for_dtype(tile, dtype)
    # Steps end where groups do.
    depth = min(tile.k, weight.group & -weight.group)
    return replace(tile, k=depth), blocks(tile.m)


def quantized_rows(
    x: torch.Tensor, weight: QuantizedWeight, target: Target
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, in] → e4m3 [rows, in] and the scales float32 [rows, groups] that a weight asks for.

    One scale for each row, or for each row and group of the weight's; or the checkpoint's own.
    """
    rows, size = x.shape
    out = torch.empty(x.shape, dtype=weight.codes.dtype, device=x.device)
    scales = torch.empty(rows, size // weight.group, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    static = weight.input_scale
    quantize_rows[(rows,)](
        x.contiguous(),
        scales if static is None else static,
        out,
        scales,
        SIZE=size,
        GROUP=weight.group,
        BLOCK=block,
        STATIC=static is not None,
        num_warps=min(16, max(1, block // 1024)),
        **target.launch_options,
    )
    return out, scales
