"""Attention of single tokens over paged KV, with long KV split into parts.

A program computes all query heads of one KV head, so that it reads keys and values once for all of
them. Lengths, offsets and block tables are read from tensors, and grids depend only on shapes, so
a captured launch is valid for every later step.

How a row is split depends on its own length and on constants of the launch, never on the other
rows: its result is the same whatever else is in the batch. The first parts of all rows have a
program each. The further parts of long rows are numbered row by row, and `extras` more programs
share them; they start first, because long rows take longest.
"""

import triton
import triton.language as tl

from model.ops.triton.kernels.online_softmax import attend, normalize
from model.ops.triton.programmatic_launch import wait_for_previous_kernel

_ROWS_AT_ONCE = tl.constexpr(128)  # whose parts are counted together


@triton.jit
def _attended_len(context_len, WINDOW: tl.constexpr):
    return context_len if WINDOW is None else tl.minimum(context_len, WINDOW)


@triton.jit
def _part_len(attended, part_len, max_parts, BLOCK_N: tl.constexpr):
    """Keys in each part of a row, a multiple of BLOCK_N; the last part may have fewer."""
    return tl.maximum(tl.cdiv(tl.cdiv(attended, max_parts), BLOCK_N) * BLOCK_N, part_len)


@triton.jit
def _find_part(
    index,
    context_lens_ptr,
    rows,
    part_len,
    max_parts,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(Row, part) of the further part with this number; a row ≥ rows: there are fewer."""
    row, before, passed = 0, 0, _ROWS_AT_ONCE
    while (passed == _ROWS_AT_ONCE) & (row < rows):
        at = row + tl.arange(0, _ROWS_AT_ONCE)
        attended = _attended_len(tl.load(context_lens_ptr + at, at < rows, other=0), WINDOW)
        parts = tl.cdiv(attended, _part_len(attended, part_len, max_parts, BLOCK_N))
        ends = before + tl.cumsum(tl.maximum(parts - 1, 0), 0)
        is_before = ends <= index
        before = tl.max(tl.where(is_before, ends, before), 0)
        passed = tl.sum(is_before.to(tl.int32), 0)
        row += passed
    return row, 1 + index - before


@triton.jit
def _combine_parts(
    mixed_ptr,
    stats_ptr,
    parts,
    GROUP: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Combine the parts of a row in their order: as `attend` of all its keys."""
    member, dim = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    is_member = member < GROUP
    mask = is_member[:, None] & (dim < OUT)[None, :]
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    mixed = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    # Unrolled so that the loads of several parts are in flight at once: 8 KiB, for the registers.
    UNROLL: tl.constexpr = 4 if BLOCK_G * BLOCK_D <= 512 else 2
    for part in tl.range(0, parts, loop_unroll_factor=UNROLL):
        at = part * GROUP + member
        part_top = tl.load(stats_ptr + part * GROUP + at, is_member, other=0.0)
        part_total = tl.load(stats_ptr + (part + 1) * GROUP + at, is_member, other=0.0)
        part_mixed = tl.load(mixed_ptr + at[:, None] * OUT + dim[None, :], mask, other=0.0)
        higher = tl.maximum(top, part_top)  # finite: a part has at least one key
        shrink, part_shrink = tl.exp2(top - higher), tl.exp2(part_top - higher)
        total = total * shrink + part_total * part_shrink
        mixed = mixed * shrink[:, None] + part_mixed * part_shrink[:, None]
        top = higher
    return top, total, mixed


@triton.jit
def _store_result(
    top,
    total,
    mixed,
    row,
    kv_head,
    sinks_ptr,
    out_ptr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SINKS: tl.constexpr,
):
    member, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + member
    mixed = normalize(top, total, mixed, sinks_ptr, head, member < GROUP, SINKS)
    target = out_ptr + (row * (KV_HEADS * GROUP) + head)[:, None] * OUT + dim[None, :]
    mask = (member < GROUP)[:, None] & (dim < OUT)[None, :]
    tl.store(target, mixed.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _attend_to_part(
    row,
    part,
    kv_head,
    query_ptr,
    kv_ptr,
    value_offset,
    block_table_ptr,
    table_stride,
    context_lens_ptr,
    sinks_ptr,
    out_ptr,
    mixed_ptr,
    stats_ptr,
    arrivals_ptr,
    max_parts,
    part_len,
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
    BLOCK_G: tl.constexpr,
    SPLIT: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = row.to(tl.int64)
    member, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    OUT: tl.constexpr = DIM - TAIL  # values of a head's result
    mask = (member < GROUP)[:, None] & (dim < OUT)[None, :]
    source = query_ptr + ((row * KV_HEADS + kv_head) * GROUP + member)[:, None] * DIM
    query = tl.load(source + dim[None, :], mask, other=0.0)
    query_tail = query
    if TAIL:
        behind = tl.arange(0, BLOCK_T)[None, :]
        is_inside = (member < GROUP)[:, None] & (behind < TAIL)
        query_tail = tl.load(source + OUT + behind, is_inside, other=0.0)

    context_len = tl.load(context_lens_ptr + row)
    attended = _attended_len(context_len, WINDOW)
    first, last, parts = context_len - attended, context_len, 1
    if SPLIT:
        size = _part_len(attended, part_len, max_parts, BLOCK_N)
        parts = tl.cdiv(attended, size)
        first += part * size
        last = tl.minimum(first + size, context_len)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top, total, mixed = attend(
        top, total, mixed, query, query_tail, context_len, kv_ptr, value_offset,
        block_table_ptr + row * table_stride, kv_head, first, last, last, False,
        SCALE, SOFTCAP, WINDOW, KV_HEADS, DIM, BLOCK_D, TAIL, BLOCK_T, BLOCK_SIZE, BLOCK_N,
        PRECISION,
    )  # fmt: skip
    if not SPLIT or parts <= 1:
        _store_result(
            top, total, mixed, row, kv_head, sinks_ptr, out_ptr,
            KV_HEADS, GROUP, OUT, BLOCK_M, BLOCK_D, SINKS,
        )  # fmt: skip
    else:
        own = row * KV_HEADS + kv_head
        mixed_ptr += own * max_parts * GROUP * OUT
        stats_ptr += own * max_parts * GROUP * 2
        at = part * GROUP + member
        tl.store(mixed_ptr + at[:, None] * OUT + dim[None, :], mixed, mask)
        tl.store(stats_ptr + part * GROUP + at, top, member < GROUP)
        tl.store(stats_ptr + (part + 1) * GROUP + at, total, member < GROUP)
        # One thread adds to the counter, for the stores of all threads before the barrier. The
        # addition releases them to, and acquires those of, the programs that added earlier.
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + own, 1, sem="acq_rel", scope="gpu") == parts - 1:
            tl.store(arrivals_ptr + own, 0)  # for the next launch
            all_top, all_total, all_mixed = _combine_parts(
                mixed_ptr, stats_ptr, parts, GROUP, OUT, BLOCK_G, BLOCK_D
            )
            _store_result(
                all_top, all_total, all_mixed, row, kv_head, sinks_ptr, out_ptr,
                KV_HEADS, GROUP, OUT, BLOCK_G, BLOCK_D, SINKS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride", "rows", "extras", "max_parts", "part_len"])
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
    arrivals_ptr,
    rows,
    extras,
    max_parts,
    part_len,
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
    BLOCK_G: tl.constexpr,
    SPLIT: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Attend with one token's group of heads to parts of its KV; grid ((extras + rows) · KV_HEADS).

    query [rows, heads, DIM], out [rows, heads, DIM - TAIL], context_lens int32 [rows]. With a TAIL
    (see `attend`) KV_HEADS is the number of parts of the heads. SPLIT: rows longer than part_len
    have up to max_parts parts. Each writes mixed float32 [rows, KV_HEADS, max_parts, GROUP,
    DIM - TAIL] and stats float32 [rows, KV_HEADS, max_parts, 2, GROUP] (maximum of the scores in
    base 2, sum of exponentials), and the one that ends last combines them. It is known by the
    counters arrivals int32 [rows · KV_HEADS], which are 0 before and after each launch.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    kv_head, slot = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    row, part = slot - extras, 0
    index, is_extra = slot, slot < extras
    has_work = True
    while has_work:
        if SPLIT and is_extra:
            row, part = _find_part(
                index, context_lens_ptr, rows, part_len, max_parts, WINDOW, BLOCK_N
            )  # fmt: skip
        has_work = row < rows
        if has_work:
            _attend_to_part(
                row, part, kv_head, query_ptr, kv_ptr, value_offset, block_table_ptr, table_stride,
                context_lens_ptr, sinks_ptr, out_ptr, mixed_ptr, stats_ptr, arrivals_ptr, max_parts,
                part_len, SCALE, SOFTCAP, WINDOW, KV_HEADS, GROUP, DIM, TAIL, BLOCK_M, BLOCK_D,
                BLOCK_T, BLOCK_SIZE, BLOCK_N, BLOCK_G, SPLIT, SINKS, PRECISION,
            )  # fmt: skip
        index += extras
        has_work = has_work & is_extra
