"""Mixture-of-experts MLP as two grouped matrix products over rows sorted by expert.

A tile has outputs as its rows and tokens as its columns. At decode the few tokens then fill the
short side of the matrix instruction, which takes weights unpacked from MXFP4 from registers.
"""

import triton
import triton.language as tl

from model.ops.triton.mxfp4 import load_weights, multiply
from model.ops.triton.norm import swiglu
from model.ops.triton.programmatic_launch import wait_for_previous_kernel


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
    """Compute columns `out` of BLOCK_M rows from `first` on, for `experts_gate_up`."""
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
        w = load_weights(
            weight_ptr, scale_ptr, out, k, SIZE, HIDDEN, ROW, BLOCK_K, PACKED, VENDOR, dtype
        )
        gate = multiply(w, x, gate, PACKED, VENDOR)
        w = load_weights(
            up_ptr, scale_ptr + SIZE, out, k, SIZE, HIDDEN, ROW, BLOCK_K, PACKED, VENDOR, dtype
        )
        up = multiply(w, x, up, PACKED, VENDOR)
    if BIAS:
        bias_ptr += expert * (2 * SIZE) + out
        gate += tl.load(bias_ptr, out < SIZE, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias_ptr + SIZE, out < SIZE, other=0.0).to(tl.float32)[:, None]
    target = out_ptr + row[None, :].to(tl.int64) * SIZE + out[:, None]
    mask = (row < end)[None, :] & (out < SIZE)[:, None]
    tl.store(target, swiglu(gate, up, LIMIT, ALPHA).to(dtype), mask)


@triton.jit
def experts_gate_up(
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
    """Compute columns `out` of BLOCK_M rows from `first` on, for `experts_down`."""
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
        w = load_weights(
            weight_ptr, scale_ptr, out, k, HIDDEN, SIZE, HIDDEN, BLOCK_K, PACKED, VENDOR, dtype
        )
        mixed = multiply(w, x, mixed, PACKED, VENDOR)
    if BIAS:
        bias = tl.load(bias_ptr + expert * HIDDEN + out, out < HIDDEN, other=0.0)
        mixed += bias.to(tl.float32)[:, None]
    pair = tl.load(order_ptr + row, row < end, other=0)
    mixed *= tl.load(router_weights_ptr + pair, row < end, other=0.0)[None, :]
    target = out_ptr + pair[None, :].to(tl.int64) * HIDDEN + out[:, None]
    tl.store(target, mixed.to(dtype), (row < end)[None, :] & (out < HIDDEN)[:, None])


@triton.jit
def experts_down(
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
    `experts_gate_up`.
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
def sum_experts(
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
