"""Attention over paged KV: single tokens with the KV split over programs, and chunks of tokens.

A program computes all query heads of one KV head, so that it reads keys and values once for all of
them: its rows are (query, head of the group) pairs. Lengths, offsets and block tables are read from
tensors, and grids depend only on shapes, so a captured launch is valid for every later step.
"""

import triton
import triton.language as tl

from model.ops.triton.programmatic_launch import wait_for_previous_kernel

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
    top,
    total,
    mixed,
    query,
    position,
    kv_ptr,
    value_offset,
    block_table_ptr,
    kv_head,
    first,
    unmasked,
    last,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax of rows (query [rows, BLOCK_D], position [rows]) over keys [first, last).

    Updates the maximum of the scores (base 2), the sum of their exponentials and the weighted sum
    of values. CAUSAL: keys are masked by position and WINDOW. Without a window all rows attend to
    all keys before `unmasked`, a multiple of BLOCK_N, so those need no mask. (With a second loop
    for them Hopper's matrix products would wait for each other, because both loops accumulate in
    the same registers.)
    """
    dim = tl.arange(0, BLOCK_D)
    for start in tl.range(first, last, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        block = tl.load(block_table_ptr + at // BLOCK_SIZE, at < last, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE
        source = kv_ptr + (slot * KV_HEADS + kv_head)[:, None] * DIM + dim[None, :]
        if BLOCK_D == DIM:
            key = tl.load(source)
        else:
            key = tl.load(source, (dim < DIM)[None, :], other=0.0)
        # Slots outside the context may hold anything, also NaN. The scores of such keys are
        # replaced, but a probability of 0 times a value of NaN is NaN, so values are zeroed.
        inside = (at < last)[:, None] & (dim < DIM)[None, :]
        value = tl.load(source + value_offset, inside, other=0.0)
        scores = tl.dot(query, key.T, input_precision=PRECISION) * (SCALE * _LOG2E)
        if CAUSAL and WINDOW is None:
            if start >= unmasked:
                mask = (at < last)[None, :] & (position[:, None] >= at[None, :])
                scores = tl.where(mask, scores, float("-inf"))
        else:
            mask = (at < last)[None, :]
            if CAUSAL:
                age = position[:, None] - at[None, :]
                mask = mask & (age >= 0) & (age < WINDOW)
            scores = tl.where(mask, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row without unmasked keys so far has no maximum to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        probs = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(probs, 1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(probs.to(value.dtype), value, mixed, input_precision=PRECISION)
        top = higher
    return top, total, mixed


@triton.jit
def _with_sink(top, total, mixed, sink):
    """Add the sink, a column of the softmax whose value is zero, and normalise."""
    higher = tl.maximum(top, sink)
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.exp2(sink - higher)
    return mixed * (shrink / total)[:, None]


@triton.jit(do_not_specialize=["table_stride"])
def decode_attention(
    query_ptr,
    kv_ptr,
    value_offset: tl.int64,
    block_table_ptr,
    table_stride,
    context_lens_ptr,
    sinks_ptr,
    out_ptr,
    mixed_ptr,
    stats_ptr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Attend with one token's group of heads to a split of its KV; grid (KV_HEADS, rows, splits).

    query, out [rows, heads, DIM], context_lens int32 [rows]. A single split writes out. Several
    (SPLIT) write mixed float32 [rows, heads, splits, DIM] and stats float32 [2, rows, heads,
    splits] (maximum of the scores in base 2, sum of exponentials) for `combine_splits`.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    kv_head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    rows, splits = tl.num_programs(1), tl.num_programs(2)
    member = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + member
    dim = tl.arange(0, BLOCK_D)
    mask = (member < GROUP)[:, None] & (dim < DIM)[None, :]
    place = (row * (KV_HEADS * GROUP) + head)[:, None] * DIM + dim[None, :]
    query = tl.load(query_ptr + place, mask, other=0.0)

    context_len = tl.load(context_lens_ptr + row)
    begin = 0 if WINDOW is None else tl.maximum(context_len - WINDOW, 0)
    split_len = tl.cdiv(tl.cdiv(context_len - begin, splits), BLOCK_N) * BLOCK_N
    first = begin + split * split_len
    last = tl.minimum(first + split_len, context_len)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top, total, mixed = _attend(
        top, total, mixed, query, context_len, kv_ptr, value_offset,
        block_table_ptr + row * table_stride, kv_head, first, last, last, False,
        SCALE, WINDOW, KV_HEADS, DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, PRECISION,
    )  # fmt: skip
    if not SPLIT:
        if SINKS:
            sink = tl.load(sinks_ptr + head, member < GROUP, other=0.0).to(tl.float32) * _LOG2E
            mixed = _with_sink(top, total, mixed, sink)
        else:
            mixed = mixed / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(out_ptr + place, mixed.to(query.dtype), mask)
    else:
        place = (row * (KV_HEADS * GROUP) + head) * splits + split
        tl.store(mixed_ptr + place[:, None] * DIM + dim[None, :], mixed, mask)
        tl.store(stats_ptr + place, top, member < GROUP)
        sums = stats_ptr + rows.to(tl.int64) * (KV_HEADS * GROUP) * splits
        tl.store(sums + place, total, member < GROUP)


@triton.jit(do_not_specialize=["splits"])
def combine_splits(
    mixed_ptr,
    stats_ptr,
    sinks_ptr,
    out_ptr,
    splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SINKS: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Combine the splits of one head and add its sink once; grid (HEADS, rows)."""
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(1)
    split = tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    is_split = split < splits
    place = (row * HEADS + head) * splits + split
    top = tl.load(stats_ptr + place, is_split, other=float("-inf"))
    total = tl.load(stats_ptr + rows.to(tl.int64) * HEADS * splits + place, is_split, other=0.0)
    source = mixed_ptr + place[:, None] * DIM + dim[None, :]
    mixed = tl.load(source, is_split[:, None] & (dim < DIM)[None, :], other=0.0)
    highest = tl.max(top, 0)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E
        highest = tl.maximum(highest, sink)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    shrink = tl.exp2(top - highest)
    whole = tl.sum(total * shrink, 0)
    if SINKS:
        whole += tl.exp2(sink - highest)
    out = tl.sum(mixed * shrink[:, None], 0) / tl.where(whole == 0, 1.0, whole)
    target = out_ptr + (row * HEADS + head) * DIM + dim
    tl.store(target, out.to(out_ptr.dtype.element_ty), dim < DIM)


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
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Attend with a tile of one sequence's queries to its KV; grid (KV_HEADS, tiles).

    Sequences [singles, sequences) are computed. The grid has one tile more for each than its
    queries may fill: sequence s starts at tile (its first query / queries a tile) + s, so that a
    program finds its sequence by bisection. cu_seqlens_q int32 [sequences + 1], context_lens int32
    [sequences].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    kv_head, tile = tl.program_id(0), tl.program_id(1)
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
    mask = is_row[:, None] & (dim < DIM)[None, :]
    place = ((start + index).to(tl.int64) * (KV_HEADS * GROUP) + head)[:, None] * DIM + dim[None, :]
    query = tl.load(query_ptr + place, mask, other=0.0)

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
    top, total, mixed = _attend(
        top, total, mixed, query, position, kv_ptr, value_offset, block_table_ptr, kv_head, first,
        unmasked, last, True, SCALE, WINDOW, KV_HEADS, DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, PRECISION,
    )  # fmt: skip
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E
        mixed = _with_sink(top, total, mixed, sink)
    else:
        mixed = mixed / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out_ptr + place, mixed.to(query.dtype), mask)
