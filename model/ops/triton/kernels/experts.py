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
    expert_starts_ptr,
    block,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Find the rows of row block `block` → (expert, first row, end of the block's rows).

    Each expert's rows start a new block. A block has BLOCK_M rows, and an expert's last one up to
    SHORT more. After the last block the expert is EXPERTS.
    """
    expert = tl.arange(0, BLOCK_E)
    start = tl.load(expert_starts_ptr + expert, expert < EXPERTS, other=0)
    end = tl.load(expert_starts_ptr + expert + 1, expert < EXPERTS, other=0)
    blocks = tl.where(end > start, tl.maximum(1, tl.cdiv(end - start - SHORT, BLOCK_M)), 0)
    cumulative = tl.cumsum(blocks, 0)
    found = tl.sum(((cumulative <= block) & (expert < EXPERTS)).to(tl.int32), 0)
    before = tl.sum(tl.where(expert < found, blocks, 0), 0)
    inside = found < EXPERTS
    first = tl.load(expert_starts_ptr + found, inside, other=0) + (block - before) * BLOCK_M
    end = tl.load(expert_starts_ptr + found + 1, inside, other=0)
    end = tl.where(end - first > BLOCK_M + SHORT, first + BLOCK_M, end)
    return found, first, end


@triton.jit
def _load_rows(
    source, at, inside, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Load columns `at` [BLOCK_K] of the rows that start at source [BLOCK_M, 1] → [K, M].

    Only low tiles skip the rows that are not inside: a high tile is mostly filled, and a condition
    for each of its rows takes registers and many instructions. Their results are not stored.
    """
    ROWS: tl.constexpr = BLOCK_M > 32
    COLUMNS: tl.constexpr = SIZE % BLOCK_K == 0
    if ROWS and COLUMNS:
        x = tl.load(source + at[None, :])
    elif ROWS:
        x = tl.load(source + at[None, :], (at < SIZE)[None, :], other=0.0)
    elif COLUMNS:
        x = tl.load(source + at[None, :], inside[:, None], other=0.0)
    else:
        x = tl.load(source + at[None, :], inside[:, None] & (at < SIZE)[None, :], other=0.0)
    return x.T


@triton.jit
def _tokens(x_ptr, order_ptr, row, end, TOP_K: tl.constexpr, HIDDEN: tl.constexpr):
    """Return where the tokens of sorted pairs `row` start in x, as [rows, 1]."""
    token = tl.load(order_ptr + tl.minimum(row, end - 1)) // TOP_K
    return x_ptr + token[:, None].to(tl.int64) * HIDDEN


@triton.jit
def _store_inner(
    gate,
    up,
    bias_ptr,
    out_ptr,
    row,
    end,
    out,
    SIZE: tl.constexpr,
    BIAS: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
):
    """Add the biases to gate and up [columns, rows] and store their SwiGLU."""
    if BIAS:
        gate += tl.load(bias_ptr + out, out < SIZE, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias_ptr + SIZE + out, out < SIZE, other=0.0).to(tl.float32)[:, None]
    target = out_ptr + row[None, :].to(tl.int64) * SIZE + out[:, None]
    mask = (row < end)[None, :] & (out < SIZE)[:, None]
    tl.store(target, swiglu(gate, up, LIMIT, ALPHA).to(out_ptr.dtype.element_ty), mask)


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
    MORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
    BIAS: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Compute columns `out` of BLOCK_M + MORE rows from `first` on, for `experts_gate_up`."""
    row = first + tl.arange(0, BLOCK_M)
    source = _tokens(x_ptr, order_ptr, row, end, TOP_K, HIDDEN)
    dtype = x_ptr.dtype.element_ty
    weight_ptr += expert.to(tl.int64) * (2 * SIZE * HIDDEN // (8 if RUN else 1))
    up_ptr = weight_ptr + SIZE * HIDDEN // (8 if RUN else 1)
    ROW: tl.constexpr = 2 * SIZE
    scale_ptr += expert.to(tl.int64) * (ROW * ((HIDDEN + 127) // 128))
    bias_ptr += expert * (2 * SIZE)
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if MORE:
        more_row = first + BLOCK_M + tl.arange(0, MORE)
        more_source = _tokens(x_ptr, order_ptr, more_row, end, TOP_K, HIDDEN)
        more_gate = tl.zeros((BLOCK_N, MORE), tl.float32)
        more_up = tl.zeros((BLOCK_N, MORE), tl.float32)
    for k in tl.range(0, HIDDEN, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        x = _load_rows(source, at, row < end, HIDDEN, BLOCK_M, BLOCK_K)
        if MORE:
            more_x = _load_rows(more_source, at, more_row < end, HIDDEN, MORE, BLOCK_K)
        w = load_weights(
            weight_ptr, scale_ptr, out, k, SIZE, HIDDEN, ROW, BLOCK_K, RUN, VENDOR, dtype
        )
        gate = multiply(w, x, gate, RUN, VENDOR)
        if MORE:
            more_gate = multiply(w, more_x, more_gate, RUN, VENDOR)
        w = load_weights(
            up_ptr, scale_ptr + SIZE, out, k, SIZE, HIDDEN, ROW, BLOCK_K, RUN, VENDOR, dtype
        )
        up = multiply(w, x, up, RUN, VENDOR)
        if MORE:
            more_up = multiply(w, more_x, more_up, RUN, VENDOR)
    _store_inner(gate, up, bias_ptr, out_ptr, row, end, out, SIZE, BIAS, LIMIT, ALPHA)
    if MORE:
        _store_inner(
            more_gate, more_up, bias_ptr, out_ptr, more_row, end, out, SIZE, BIAS, LIMIT, ALPHA
        )


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
    RUN: tl.constexpr,
    BIAS: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    VENDOR: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Gate and up projection and SwiGLU of a tile; grid (⌈SIZE / BLOCK_N⌉, row blocks).

    x [tokens, HIDDEN], weight [EXPERTS, 2 · SIZE, HIDDEN] (gate rows first) and its scales, bias
    [EXPERTS, 2 · SIZE], order and expert_starts from `sort_by_expert` → out [sorted pairs, SIZE].
    Up to SHORT rows use a low tile if an expert has no others; otherwise they are computed with
    the last BLOCK_M rows, so that weights are loaded and unpacked once for both.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    expert, first, end = _find_row_block(
        expert_starts_ptr, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_M, SHORT
    )
    if expert >= EXPERTS:
        return
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SHORT > 0 and end - first <= SHORT:
        _gate_up_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, order_ptr, out_ptr, expert, first, end, out,
            TOP_K, HIDDEN, SIZE, SHORT, 0, BLOCK_N, BLOCK_K, RUN, BIAS, LIMIT, ALPHA, VENDOR,
        )  # fmt: skip
    elif SHORT > 0 and end - first > BLOCK_M:
        _gate_up_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, order_ptr, out_ptr, expert, first, end, out,
            TOP_K, HIDDEN, SIZE, BLOCK_M, SHORT, BLOCK_N, BLOCK_K, RUN, BIAS, LIMIT, ALPHA,
            VENDOR,
        )  # fmt: skip
    else:
        _gate_up_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, order_ptr, out_ptr, expert, first, end, out,
            TOP_K, HIDDEN, SIZE, BLOCK_M, 0, BLOCK_N, BLOCK_K, RUN, BIAS, LIMIT, ALPHA, VENDOR,
        )  # fmt: skip


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
    out,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
    BIAS: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Compute columns `out` of BLOCK_M + MORE rows from `first` on, for `experts_down`."""
    row = first + tl.arange(0, BLOCK_M)
    dtype = x_ptr.dtype.element_ty
    source = x_ptr + tl.minimum(row, end - 1)[:, None].to(tl.int64) * SIZE
    weight_ptr += expert.to(tl.int64) * (HIDDEN * SIZE // (8 if RUN else 1))
    scale_ptr += expert.to(tl.int64) * (HIDDEN * ((SIZE + 127) // 128))
    bias_ptr += expert * HIDDEN
    mixed = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if MORE:
        more_row = first + BLOCK_M + tl.arange(0, MORE)
        more_source = x_ptr + tl.minimum(more_row, end - 1)[:, None].to(tl.int64) * SIZE
        more_mixed = tl.zeros((BLOCK_N, MORE), tl.float32)
    for k in tl.range(0, SIZE, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        x = _load_rows(source, at, row < end, SIZE, BLOCK_M, BLOCK_K)
        if MORE:
            more_x = _load_rows(more_source, at, more_row < end, SIZE, MORE, BLOCK_K)
        w = load_weights(
            weight_ptr, scale_ptr, out, k, HIDDEN, SIZE, HIDDEN, BLOCK_K, RUN, VENDOR, dtype
        )
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
    expert, first, end = _find_row_block(
        expert_starts_ptr, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_M, SHORT
    )
    if expert >= EXPERTS:
        return
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SHORT > 0 and end - first <= SHORT:
        _down_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, router_weights_ptr, order_ptr, out_ptr, expert,
            first, end, out, HIDDEN, SIZE, SHORT, 0, BLOCK_N, BLOCK_K, RUN, BIAS, VENDOR,
        )  # fmt: skip
    elif SHORT > 0 and end - first > BLOCK_M:
        _down_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, router_weights_ptr, order_ptr, out_ptr, expert,
            first, end, out, HIDDEN, SIZE, BLOCK_M, SHORT, BLOCK_N, BLOCK_K, RUN, BIAS, VENDOR,
        )  # fmt: skip
    else:
        _down_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, router_weights_ptr, order_ptr, out_ptr, expert,
            first, end, out, HIDDEN, SIZE, BLOCK_M, 0, BLOCK_N, BLOCK_K, RUN, BIAS, VENDOR,
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
