"""Second grouped matrix product of experts, and the sum of each token's results.

Tiles are as in `experts_gate_up`.
"""

import triton
import triton.language as tl

from model.ops.triton.kernels.expert_rows import find_row_block, load_rows
from model.ops.triton.mxfp4 import load_weights, multiply
from model.ops.triton.programmatic_launch import wait_for_previous_kernel


@triton.jit
def _store_pairs(
    mixed,
    bias_ptr,
    router_weights_ptr,
    order_ptr,
    out_ptr,
    row,
    end,
    out,
    HIDDEN: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Add the bias to mixed [columns, rows], multiply by the router's weights and store it."""
    if BIAS:
        mixed += tl.load(bias_ptr + out, out < HIDDEN, other=0.0).to(tl.float32)[:, None]
    pair = tl.load(order_ptr + row, row < end, other=0)
    mixed *= tl.load(router_weights_ptr + pair, row < end, other=0.0)[None, :]
    target = out_ptr + pair[None, :].to(tl.int64) * HIDDEN + out[:, None]
    mask = (row < end)[None, :] & (out < HIDDEN)[:, None]
    tl.store(target, mixed.to(out_ptr.dtype.element_ty), mask)


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
    first_out,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
    BIAS: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Compute BLOCK_N columns from `first_out` on of BLOCK_M + MORE rows from `first` on."""
    row = first + tl.arange(0, BLOCK_M)
    out = first_out + tl.arange(0, BLOCK_N)
    dtype = x_ptr.dtype.element_ty
    source = x_ptr + tl.minimum(row, end - 1)[:, None].to(tl.int64) * SIZE
    weight_ptr += expert.to(tl.int64) * (HIDDEN * ROW)
    scale_ptr += expert.to(tl.int64) * (HIDDEN * ((SIZE + 127) // 128))
    bias_ptr += expert * HIDDEN
    mixed = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if MORE:
        more_row = first + BLOCK_M + tl.arange(0, MORE)
        more_source = x_ptr + tl.minimum(more_row, end - 1)[:, None].to(tl.int64) * SIZE
        more_mixed = tl.zeros((BLOCK_N, MORE), tl.float32)
    for k in tl.range(0, SIZE, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        x = load_rows(source, at, row < end, SIZE, BLOCK_M, BLOCK_K)
        if MORE:
            more_x = load_rows(more_source, at, more_row < end, SIZE, MORE, BLOCK_K)
        w = load_weights(
            weight_ptr, scale_ptr, first_out, k, HIDDEN, SIZE, ROW, HIDDEN, BLOCK_N, BLOCK_K, RUN,
            VENDOR, dtype,
        )  # fmt: skip
        mixed = multiply(w, x, mixed, RUN, VENDOR)
        if MORE:
            more_mixed = multiply(w, more_x, more_mixed, RUN, VENDOR)
    _store_pairs(
        mixed, bias_ptr, router_weights_ptr, order_ptr, out_ptr, row, end, out, HIDDEN, BIAS
    )
    if MORE:
        _store_pairs(
            more_mixed, bias_ptr, router_weights_ptr, order_ptr, out_ptr, more_row, end, out,
            HIDDEN, BIAS,
        )  # fmt: skip


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
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
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
    expert, first, end = find_row_block(
        expert_starts_ptr, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_M, SHORT
    )
    if expert >= EXPERTS:
        return
    first_out = tl.program_id(0) * BLOCK_N
    if SHORT > 0 and end - first <= SHORT:
        _down_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, router_weights_ptr, order_ptr, out_ptr, expert,
            first, end, first_out, HIDDEN, SIZE, ROW, SHORT, 0, BLOCK_N, BLOCK_K, RUN, BIAS, VENDOR,
        )  # fmt: skip
    elif SHORT > 0 and end - first > BLOCK_M:
        _down_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, router_weights_ptr, order_ptr, out_ptr, expert,
            first, end, first_out, HIDDEN, SIZE, ROW, BLOCK_M, SHORT, BLOCK_N, BLOCK_K, RUN, BIAS,
            VENDOR,
        )  # fmt: skip
    else:
        _down_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, router_weights_ptr, order_ptr, out_ptr, expert,
            first, end, first_out, HIDDEN, SIZE, ROW, BLOCK_M, 0, BLOCK_N, BLOCK_K, RUN, BIAS,
            VENDOR,
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
