"""First of the two grouped matrix products of experts: gate and up, with SwiGLU.

The rows of both products are (token, expert) pairs, sorted by expert. A tile has outputs as its
rows and tokens as its columns. At decode the few tokens then fill the short side of the matrix
instruction, which takes weights unpacked from MXFP4 from registers.
"""

import triton
import triton.language as tl

from model.ops.triton.kernels.expert_rows import find_row_block, load_rows
from model.ops.triton.mxfp4 import load_weights, multiply
from model.ops.triton.norm import swiglu
from model.ops.triton.programmatic_launch import wait_for_previous_kernel


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
    first_out,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    ROW: tl.constexpr,
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
    """Compute BLOCK_N columns from `first_out` on of BLOCK_M + MORE rows from `first` on."""
    row = first + tl.arange(0, BLOCK_M)
    out = first_out + tl.arange(0, BLOCK_N)
    source = _tokens(x_ptr, order_ptr, row, end, TOP_K, HIDDEN)
    dtype = x_ptr.dtype.element_ty
    weight_ptr += expert.to(tl.int64) * (2 * SIZE * ROW)
    up_ptr = weight_ptr + SIZE * ROW
    SCALES: tl.constexpr = 2 * SIZE
    scale_ptr += expert.to(tl.int64) * (SCALES * ((HIDDEN + 127) // 128))
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
        x = load_rows(source, at, row < end, HIDDEN, BLOCK_M, BLOCK_K)
        if MORE:
            more_x = load_rows(more_source, at, more_row < end, HIDDEN, MORE, BLOCK_K)
        w = load_weights(
            weight_ptr, scale_ptr, first_out, k, SIZE, HIDDEN, ROW, SCALES, BLOCK_N, BLOCK_K,
            RUN, VENDOR, dtype,
        )  # fmt: skip
        gate = multiply(w, x, gate, RUN, VENDOR)
        if MORE:
            more_gate = multiply(w, more_x, more_gate, RUN, VENDOR)
        w = load_weights(
            up_ptr, scale_ptr + SIZE, first_out, k, SIZE, HIDDEN, ROW, SCALES, BLOCK_N, BLOCK_K,
            RUN, VENDOR, dtype,
        )  # fmt: skip
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
    ROW: tl.constexpr,
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
    expert, first, end = find_row_block(
        expert_starts_ptr, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_M, SHORT
    )
    if expert >= EXPERTS:
        return
    first_out = tl.program_id(0) * BLOCK_N
    if SHORT > 0 and end - first <= SHORT:
        _gate_up_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, order_ptr, out_ptr, expert, first, end,
            first_out, TOP_K, HIDDEN, SIZE, ROW, SHORT, 0, BLOCK_N, BLOCK_K, RUN, BIAS, LIMIT,
            ALPHA, VENDOR,
        )  # fmt: skip
    elif SHORT > 0 and end - first > BLOCK_M:
        _gate_up_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, order_ptr, out_ptr, expert, first, end,
            first_out, TOP_K, HIDDEN, SIZE, ROW, BLOCK_M, SHORT, BLOCK_N, BLOCK_K, RUN, BIAS, LIMIT,
            ALPHA, VENDOR,
        )  # fmt: skip
    else:
        _gate_up_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, order_ptr, out_ptr, expert, first, end,
            first_out, TOP_K, HIDDEN, SIZE, ROW, BLOCK_M, 0, BLOCK_N, BLOCK_K, RUN, BIAS, LIMIT,
            ALPHA, VENDOR,
        )  # fmt: skip
