"""Attention of chunks of tokens over paged KV.

A program computes all query heads of one KV head, so that it reads keys and values once for all of
them: its rows are (query, head of the group) pairs.
"""

import triton
import triton.language as tl

from model.ops.triton.kernels.online_softmax import attend, normalize
from model.ops.triton.programmatic_launch import wait_for_previous_kernel


@triton.jit(do_not_specialize=["table_stride", "singles", "sequences"])
def prefill_attention(
    query_ptr,
    kv_ptr,
    value_offset: tl.int64,
    block_table_ptr,
    table_stride,
    cu_seqlens_q_ptr,
    context_lens_ptr,
    sinks_ptr,
    out_ptr,
    singles,
    sequences,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Attend with a tile of one sequence's queries to its KV; grid (tiles · KV_HEADS).

    Sequences [singles, sequences) are computed. The grid has one tile more for each than its
    queries may fill: sequence s starts at tile (its first query / queries a tile) + s, so that a
    program finds its sequence by bisection. cu_seqlens_q int32 [sequences + 1], context_lens int32
    [sequences].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    # On the first axis, because the others are limited to 65,535.
    kv_head, tile = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    low, high = singles, sequences
    while high - low > 1:
        middle = (low + high) // 2
        first_tile = (tl.load(cu_seqlens_q_ptr + middle) - singles) // QUERIES + middle - singles
        if first_tile <= tile:
            low = middle
        else:
            high = middle
    start = tl.load(cu_seqlens_q_ptr + low)
    count = tl.load(cu_seqlens_q_ptr + low + 1) - start
    skipped = (tile - ((start - singles) // QUERIES + low - singles)) * QUERIES
    if skipped >= count:
        return

    member = tl.arange(0, BLOCK_M)
    index = skipped + member // GROUP
    head = kv_head * GROUP + member % GROUP
    dim = tl.arange(0, BLOCK_D)
    is_row = (member < QUERIES * GROUP) & (index < count)
    OUT: tl.constexpr = DIM - TAIL  # values of a head's result
    mask = is_row[:, None] & (dim < OUT)[None, :]
    place = ((start + index).to(tl.int64) * (KV_HEADS * GROUP) + head)[:, None]
    query = tl.load(query_ptr + place * DIM + dim[None, :], mask, other=0.0)
    query_tail = query
    if TAIL:
        behind = tl.arange(0, BLOCK_T)[None, :]
        source = query_ptr + place * DIM + OUT + behind
        query_tail = tl.load(source, is_row[:, None] & (behind < TAIL), other=0.0)

    before = tl.load(context_lens_ptr + low) - count
    position = before + index
    first = 0
    if WINDOW is not None:
        first = tl.maximum(before + skipped - WINDOW + 1, 0)
    last = before + tl.minimum(skipped + QUERIES, count)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    block_table_ptr += low.to(tl.int64) * table_stride
    unmasked = (before + skipped + 1) // BLOCK_N * BLOCK_N  # the first query attends to itself
    top, total, mixed = attend(
        top, total, mixed, query, query_tail, position, kv_ptr, value_offset, block_table_ptr,
        kv_head, first, unmasked, last, True, SCALE, SOFTCAP, WINDOW, KV_HEADS, DIM, BLOCK_D, TAIL,
        BLOCK_T, BLOCK_SIZE, BLOCK_N, PRECISION,
    )  # fmt: skip
    mixed = normalize(top, total, mixed, sinks_ptr, head, is_row, SINKS)
    tl.store(out_ptr + place * OUT + dim[None, :], mixed.to(query.dtype), mask)
