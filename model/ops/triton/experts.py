"""Mixture-of-experts MLP as two grouped matrix products over rows sorted by expert.

A tile has outputs as its rows and tokens as its columns. At decode the few tokens then fill the
short side of the matrix instruction, which takes weights unpacked from MXFP4 from registers.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from model.ops.specs import Activation, Experts, ExpertShard
from model.ops.triton.mxfp4 import unpack
from model.ops.triton.norm import swiglu
from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.sort_by_expert import sort_by_expert
from model.ops.triton.tiles import Target, Tile, for_dtype


@triton.jit
def _find_row_block(
    expert_starts_ptr, block, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Find the rows of row block `block` → (expert, first row, end of the expert's rows).

    Each expert's rows start a new block; after the last block the expert is EXPERTS.
    """
    expert = tl.arange(0, BLOCK_E)
    start = tl.load(expert_starts_ptr + expert, expert < EXPERTS, other=0)
    end = tl.load(expert_starts_ptr + expert + 1, expert < EXPERTS, other=0)
    blocks = (end - start + BLOCK_M - 1) // BLOCK_M
    cumulative = tl.cumsum(blocks, 0)
    found = tl.sum(((cumulative <= block) & (expert < EXPERTS)).to(tl.int32), 0)
    before = tl.sum(tl.where(expert < found, blocks, 0), 0)
    inside = found < EXPERTS
    first = tl.load(expert_starts_ptr + found, inside, other=0) + (block - before) * BLOCK_M
    end = tl.load(expert_starts_ptr + found + 1, inside, other=0)
    return found, first, end


@triton.jit
def _load_weights(
    weight_ptr,
    scale_ptr,
    out,
    k,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    VENDOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Load rows `out` [BLOCK_N] and columns [k, k + BLOCK_K) of a weight [OUT, IN].

    PACKED: the weight is MXFP4 in words. The words with scales of the same columns are contiguous,
    SCALE_ROW of them; BLOCK_K is 32, 64 or 128, so that a row needs one of them.
    """
    whole: tl.constexpr = IN % BLOCK_K == 0
    row = out[:, None].to(tl.int64)
    inside = (out < OUT)[:, None]
    if PACKED:
        at = k // 8 + tl.arange(0, BLOCK_K // 8)
        mask = inside if whole else inside & (at < IN // 8)[None, :]
        words = tl.load(weight_ptr + row * (IN // 8) + at[None, :], mask, other=0)
        scales = tl.load(scale_ptr + k // 128 * SCALE_ROW + out, out < OUT, other=0)
        return unpack(words, scales, k // 32 % 4, VENDOR, DTYPE)
    else:  # after an `if` without `else` the compiler would see both returns
        at = k + tl.arange(0, BLOCK_K)
        mask = inside if whole else inside & (at < IN)[None, :]
        return tl.load(weight_ptr + row * IN + at[None, :], mask, other=0.0)


@triton.jit
def _multiply(w, x, total, PACKED: tl.constexpr, VENDOR: tl.constexpr):
    """Return total + w · x; if w was unpacked on an NVIDIA GPU, wait until it is computed.

    Hopper's matrix products are asynchronous and read w from registers, which compilers have
    overwritten with the next weights too early (triton-lang/triton#9433). They wait for the product
    where the sum is used, and an empty instruction counts as a use.
    """
    total = tl.dot(w, x, total, input_precision="ieee")
    if PACKED and VENDOR == "nvidia":
        total = tl.inline_asm_elementwise(
            "// $0", "=r,0", [total], dtype=tl.float32, is_pure=True, pack=1
        )
    return total


@triton.jit
def _gate_up_rows(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    order_ptr,
    out_ptr,
    expert,
    first,
    end,
    out,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Compute columns `out` of BLOCK_M rows from `first` on, for `_experts_gate_up`."""
    row = first + tl.arange(0, BLOCK_M)
    token = tl.load(order_ptr + row, row < end, other=0) // TOP_K
    dtype = x_ptr.dtype.element_ty
    source = x_ptr + token[:, None].to(tl.int64) * HIDDEN
    weight_ptr += expert.to(tl.int64) * (2 * SIZE * HIDDEN // (8 if PACKED else 1))
    up_ptr = weight_ptr + SIZE * HIDDEN // (8 if PACKED else 1)
    ROW: tl.constexpr = 2 * SIZE
    scale_ptr += expert.to(tl.int64) * (ROW * ((HIDDEN + 127) // 128))
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, HIDDEN, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        mask = (row < end)[:, None]
        if HIDDEN % BLOCK_K != 0:
            mask = mask & (at < HIDDEN)[None, :]
        x = tl.load(source + at[None, :], mask, other=0.0).T
        w = _load_weights(
            weight_ptr, scale_ptr, out, k, SIZE, HIDDEN, ROW, BLOCK_K, PACKED, VENDOR, dtype
        )
        gate = _multiply(w, x, gate, PACKED, VENDOR)
        w = _load_weights(
            up_ptr, scale_ptr + SIZE, out, k, SIZE, HIDDEN, ROW, BLOCK_K, PACKED, VENDOR, dtype
        )
        up = _multiply(w, x, up, PACKED, VENDOR)
    if BIAS:
        bias_ptr += expert * (2 * SIZE) + out
        gate += tl.load(bias_ptr, out < SIZE, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias_ptr + SIZE, out < SIZE, other=0.0).to(tl.float32)[:, None]
    target = out_ptr + row[None, :].to(tl.int64) * SIZE + out[:, None]
    mask = (row < end)[None, :] & (out < SIZE)[:, None]
    tl.store(target, swiglu(gate, up, LIMIT, ALPHA).to(dtype), mask)


@triton.jit
def _experts_gate_up(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    order_ptr,
    expert_starts_ptr,
    out_ptr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    VENDOR: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Gate and up projection and SwiGLU of a tile; grid (⌈SIZE / BLOCK_N⌉, row blocks).

    x [tokens, HIDDEN], weight [EXPERTS, 2 · SIZE, HIDDEN] (gate rows first) and its scales, bias
    [EXPERTS, 2 · SIZE], order and expert_starts from `sort_by_expert` → out [sorted pairs, SIZE].
    The last rows of an expert use a tile of SHORT rows if they fit into it.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    expert, first, end = _find_row_block(
        expert_starts_ptr, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_M
    )
    if expert >= EXPERTS:
        return
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SHORT < BLOCK_M and end - first <= SHORT:
        _gate_up_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, order_ptr, out_ptr, expert, first, end, out,
            TOP_K, HIDDEN, SIZE, SHORT, BLOCK_N, BLOCK_K, PACKED, BIAS, LIMIT, ALPHA, VENDOR,
        )  # fmt: skip
    else:
        _gate_up_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, order_ptr, out_ptr, expert, first, end, out,
            TOP_K, HIDDEN, SIZE, BLOCK_M, BLOCK_N, BLOCK_K, PACKED, BIAS, LIMIT, ALPHA, VENDOR,
        )  # fmt: skip


@triton.jit
def _down_rows(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    router_weights_ptr,
    order_ptr,
    out_ptr,
    expert,
    first,
    end,
    out,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Compute columns `out` of BLOCK_M rows from `first` on, for `_experts_down`."""
    row = first + tl.arange(0, BLOCK_M)
    dtype = x_ptr.dtype.element_ty
    source = x_ptr + row[:, None].to(tl.int64) * SIZE
    weight_ptr += expert.to(tl.int64) * (HIDDEN * SIZE // (8 if PACKED else 1))
    scale_ptr += expert.to(tl.int64) * (HIDDEN * ((SIZE + 127) // 128))
    mixed = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, SIZE, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        mask = (row < end)[:, None]
        if SIZE % BLOCK_K != 0:
            mask = mask & (at < SIZE)[None, :]
        x = tl.load(source + at[None, :], mask, other=0.0).T
        w = _load_weights(
            weight_ptr, scale_ptr, out, k, HIDDEN, SIZE, HIDDEN, BLOCK_K, PACKED, VENDOR, dtype
        )
        mixed = _multiply(w, x, mixed, PACKED, VENDOR)
    if BIAS:
        bias = tl.load(bias_ptr + expert * HIDDEN + out, out < HIDDEN, other=0.0)
        mixed += bias.to(tl.float32)[:, None]
    pair = tl.load(order_ptr + row, row < end, other=0)
    mixed *= tl.load(router_weights_ptr + pair, row < end, other=0.0)[None, :]
    target = out_ptr + pair[None, :].to(tl.int64) * HIDDEN + out[:, None]
    tl.store(target, mixed.to(dtype), (row < end)[None, :] & (out < HIDDEN)[:, None])


@triton.jit
def _experts_down(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    router_weights_ptr,
    order_ptr,
    expert_starts_ptr,
    out_ptr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    VENDOR: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Down projection of a tile, times the router's weights; grid (⌈HIDDEN / BLOCK_N⌉, row blocks).

    x [sorted pairs, SIZE], weight [EXPERTS, HIDDEN, SIZE] and its scales, bias [EXPERTS, HIDDEN],
    router_weights float32 [pairs] → out [pairs, HIDDEN], in the order before sorting. Tiles as in
    `_experts_gate_up`.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    expert, first, end = _find_row_block(
        expert_starts_ptr, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_M
    )
    if expert >= EXPERTS:
        return
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SHORT < BLOCK_M and end - first <= SHORT:
        _down_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, router_weights_ptr, order_ptr, out_ptr, expert,
            first, end, out, HIDDEN, SIZE, SHORT, BLOCK_N, BLOCK_K, PACKED, BIAS, VENDOR,
        )  # fmt: skip
    else:
        _down_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, router_weights_ptr, order_ptr, out_ptr, expert,
            first, end, out, HIDDEN, SIZE, BLOCK_M, BLOCK_N, BLOCK_K, PACKED, BIAS, VENDOR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first"])
def _sum_experts(
    pairs_ptr,
    chosen_ptr,
    out_ptr,
    first,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Sum a token's pairs, always in the same order; grid (tokens, ⌈HIDDEN / BLOCK⌉).

    pairs [tokens · TOP_K, HIDDEN] → out [tokens, HIDDEN]. Pairs are skipped unless their expert,
    from chosen [tokens · TOP_K], is one of the EXPERTS from `first` on.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        expert = tl.load(chosen_ptr + pair) - first
        mask = (at < HIDDEN) & (expert >= 0) & (expert < EXPERTS)
        total += tl.load(pairs_ptr + pair * HIDDEN + at, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + at, total.to(out_ptr.dtype.element_ty), at < HIDDEN)


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
    _experts_gate_up[(triton.cdiv(size, tile.n), blocks)](
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
    _experts_down[(triton.cdiv(hidden, tile.n), blocks)](
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
    _sum_experts[(tokens, triton.cdiv(hidden, block))](
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
