"""Attention over paged KV: single tokens with the KV split over programs, chunks of many tokens.

A program serves all query heads of one KV head, so that keys and values are read once for them:
its rows are (query, head of the group) pairs. Lengths, starts and block tables come from tensors
only; grids depend on numbers of rows and widths, so a captured launch fits every later step.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.specs import AttentionSpec
from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.tiles import Target, Tile, for_dtype

_LOG2E = tl.constexpr(1.4426950408889634)
_MAX_SPLITS = 32
_LEAST_TILES = 4  # of a window in a part: parts take a second launch to put together


@triton.jit
def _attend(
    top,
    total,
    mixed,
    query,
    position,
    kv_ptr,
    value_offset,
    table_ptr,
    kv_head,
    first,
    sure,
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

    Carries the scores' maximum (base 2), the sum of shares and the mixed values. CAUSAL: rows may
    not see all of these keys, by position and WINDOW; without one, those before `sure`, a whole
    number of tiles, are seen by every row. (In two loops, one that masks and one that does not,
    Hopper's products wait for each other: the sums are in the same registers.)
    """
    dim = tl.arange(0, BLOCK_D)
    for start in tl.range(first, last, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        block = tl.load(table_ptr + at // BLOCK_SIZE, at < last, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE
        source = kv_ptr + (slot * KV_HEADS + kv_head)[:, None] * DIM + dim[None, :]
        if BLOCK_D == DIM:
            key = tl.load(source)
        else:
            key = tl.load(source, (dim < DIM)[None, :], other=0.0)
        # What lies outside may be anything, NaN included. Of keys that only makes scores, which are
        # replaced; but a share of 0 times NaN is NaN: zeros are loaded there.
        inside = (at < last)[:, None] & (dim < DIM)[None, :]
        value = tl.load(source + value_offset, inside, other=0.0)
        scores = tl.dot(query, key.T, input_precision=PRECISION) * (SCALE * _LOG2E)
        if CAUSAL and WINDOW is None:
            if start >= sure:
                seen = (at < last)[None, :] & (position[:, None] >= at[None, :])
                scores = tl.where(seen, scores, float("-inf"))
        else:
            seen = (at < last)[None, :]
            if CAUSAL:
                age = position[:, None] - at[None, :]
                seen = seen & (age >= 0) & (age < WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(shares, 1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(shares.to(value.dtype), value, mixed, input_precision=PRECISION)
        top = higher
    return top, total, mixed


@triton.jit
def _with_sink(top, total, mixed, sink):
    """Add one more column of the softmax, whose value is zero, and divide by the sum of shares."""
    higher = tl.maximum(top, sink)
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.exp2(sink - higher)
    return mixed * (shrink / total)[:, None]


@triton.jit(do_not_specialize=["table_stride"])
def _decode(
    query_ptr,
    kv_ptr,
    value_offset: tl.int64,
    table_ptr,
    table_stride,
    seen_ptr,
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
    """One token's group of heads over a part of its KV; grid (KV_HEADS, rows, splits).

    query, out [rows, heads, DIM], seen int32 [rows]. With one split out is final; with more
    (SPLIT), mixed float32 [rows, heads, splits, DIM] and stats float32 [2, rows, heads, splits]
    (maximum in base 2, sum of shares) are left for `_combine`.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    kv_head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    rows, splits = tl.num_programs(1), tl.num_programs(2)
    member = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + member
    dim = tl.arange(0, BLOCK_D)
    ours = (member < GROUP)[:, None] & (dim < DIM)[None, :]
    place = (row * (KV_HEADS * GROUP) + head)[:, None] * DIM + dim[None, :]
    query = tl.load(query_ptr + place, ours, other=0.0)

    seen = tl.load(seen_ptr + row)
    begin = 0 if WINDOW is None else tl.maximum(seen - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(seen - begin, splits), BLOCK_N) * BLOCK_N
    first = begin + split * share
    last = tl.minimum(first + share, seen)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top, total, mixed = _attend(
        top, total, mixed, query, seen, kv_ptr, value_offset, table_ptr + row * table_stride,
        kv_head, first, last, last, False, SCALE, WINDOW, KV_HEADS, DIM, BLOCK_D, BLOCK_SIZE,
        BLOCK_N, PRECISION,
    )  # fmt: skip
    if not SPLIT:
        if SINKS:
            sink = tl.load(sinks_ptr + head, member < GROUP, other=0.0).to(tl.float32) * _LOG2E
            mixed = _with_sink(top, total, mixed, sink)
        else:
            mixed = mixed / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(out_ptr + place, mixed.to(query.dtype), ours)
    else:
        place = (row * (KV_HEADS * GROUP) + head) * splits + split
        tl.store(mixed_ptr + place[:, None] * DIM + dim[None, :], mixed, ours)
        tl.store(stats_ptr + place, top, member < GROUP)
        sums = stats_ptr + rows.to(tl.int64) * (KV_HEADS * GROUP) * splits
        tl.store(sums + place, total, member < GROUP)


@triton.jit(do_not_specialize=["splits"])
def _combine(
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
    """The splits of one head put together, its sink added once; grid (HEADS, rows)."""
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(1)
    split = tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    there = split < splits
    place = (row * HEADS + head) * splits + split
    top = tl.load(stats_ptr + place, there, other=float("-inf"))
    total = tl.load(stats_ptr + rows.to(tl.int64) * HEADS * splits + place, there, other=0.0)
    source = mixed_ptr + place[:, None] * DIM + dim[None, :]
    mixed = tl.load(source, there[:, None] & (dim < DIM)[None, :], other=0.0)
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
def _prefill(
    query_ptr,
    kv_ptr,
    value_offset: tl.int64,
    table_ptr,
    table_stride,
    starts_ptr,
    seen_ptr,
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
    """A tile of one sequence's queries over its KV; grid (KV_HEADS, tiles).

    Sequences [singles, sequences) are served, one tile more than their queries fill being kept
    for each: sequence s begins with tile (its first query / queries a tile) + s, so that a tile
    finds its sequence by bisection. starts int32 [sequences + 1], seen int32 [sequences].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    kv_head, tile = tl.program_id(0), tl.program_id(1)
    low, high = singles, sequences
    while high - low > 1:
        middle = (low + high) // 2
        begins = (tl.load(starts_ptr + middle) - singles) // QUERIES + middle - singles
        if begins <= tile:
            low = middle
        else:
            high = middle
    start = tl.load(starts_ptr + low)
    count = tl.load(starts_ptr + low + 1) - start
    skipped = (tile - ((start - singles) // QUERIES + low - singles)) * QUERIES
    if skipped >= count:
        return

    member = tl.arange(0, BLOCK_M)
    turn = skipped + member // GROUP
    head = kv_head * GROUP + member % GROUP
    dim = tl.arange(0, BLOCK_D)
    row_ours = (member < QUERIES * GROUP) & (turn < count)
    ours = row_ours[:, None] & (dim < DIM)[None, :]
    place = ((start + turn).to(tl.int64) * (KV_HEADS * GROUP) + head)[:, None] * DIM + dim[None, :]
    query = tl.load(query_ptr + place, ours, other=0.0)

    before = tl.load(seen_ptr + low) - count
    position = before + turn
    first = 0
    if WINDOW is not None:
        first = tl.maximum(before + skipped - WINDOW + 1, 0)
    last = before + tl.minimum(skipped + QUERIES, count)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    table_ptr += low.to(tl.int64) * table_stride
    sure = (before + skipped + 1) // BLOCK_N * BLOCK_N  # the first query sees itself
    top, total, mixed = _attend(
        top, total, mixed, query, position, kv_ptr, value_offset, table_ptr, kv_head, first, sure,
        last, True, SCALE, WINDOW, KV_HEADS, DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, PRECISION,
    )  # fmt: skip
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E
        mixed = _with_sink(top, total, mixed, sink)
    else:
        mixed = mixed / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out_ptr + place, mixed.to(query.dtype), ours)


@dataclass(frozen=True)
class _Call:
    """The arguments of one attention operation, and the shapes that its launches share."""

    query: torch.Tensor  # [tokens, heads, head_dim], contiguous
    kv: torch.Tensor  # [2, blocks, block_size, kv_heads, head_dim]
    batch: ForwardBatch
    block_table: torch.Tensor  # int32 [sequences, blocks]
    spec: AttentionSpec
    sinks: torch.Tensor | None  # [heads]
    target: Target

    @property
    def sinks_or_any(self) -> torch.Tensor:
        """The sinks, or a tensor that takes their place where there are none."""
        return self.query if self.sinks is None else self.sinks

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants of the kernels that read keys and values."""
        _, heads, dim = self.query.shape
        _, _, block_size, kv_heads, _ = self.kv.shape
        return {
            "SCALE": self.spec.scale,
            "WINDOW": self.spec.window,
            "KV_HEADS": kv_heads,
            "GROUP": heads // kv_heads,
            "DIM": dim,
            "BLOCK_D": max(16, triton.next_power_of_2(dim)),
            "BLOCK_SIZE": block_size,
            "SINKS": self.sinks is not None,
            "PRECISION": "ieee",
        }


def attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: ForwardBatch,
    group: GroupTables,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
    target: Target,
) -> torch.Tensor:
    """As `Backend.attention`; a sequence of length 0, which only pads a batch, gives zeros."""
    call = _Call(query.contiguous(), kv, batch, group.block_table, spec, sinks, target)
    out = torch.empty_like(call.query)
    if batch.num_single:
        _attend_single_tokens(call, out)
    if batch.context_lens.shape[0] > batch.num_single:
        _attend_chunks(call, out)
    return out


def splits_of(rows: int, kv_heads: int, window: int | None, tile: Tile, processors: int) -> int:
    """Return into how many parts the KV of each token is split: a power of 2.

    As many as keep the device busy. The context lengths do not matter, so that a step with few
    short rows needs no kernel that was not compiled for the captured steps.
    """
    most = min(_MAX_SPLITS, 2 * processors // (rows * kv_heads))
    if window is not None:
        most = min(most, triton.cdiv(window, _LEAST_TILES * tile.n))
    return 1 << max(0, most.bit_length() - 1)


def _attend_single_tokens(call: _Call, out: torch.Tensor) -> None:
    query, kv, block_table, target = call.query, call.kv, call.block_table, call.target
    constants, rows = call.constants, call.batch.num_single
    _, heads, dim = query.shape
    kv_heads, group = constants["KV_HEADS"], constants["GROUP"]
    tile = for_dtype(target.tiles.decode, query.dtype)
    splits = splits_of(rows, kv_heads, call.spec.window, tile, target.processors)
    mixed = stats = out
    if splits > 1:
        mixed = query.new_empty(rows, heads, splits, dim, dtype=torch.float32)
        stats = query.new_empty(2, rows, heads, splits, dtype=torch.float32)
    _decode[(kv_heads, rows, splits)](
        query,
        kv,
        kv.stride(0),
        block_table,
        block_table.stride(0),
        call.batch.context_lens,
        call.sinks_or_any,
        out,
        mixed,
        stats,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_N=tile.n,
        SPLIT=splits > 1,
        **constants,
        **tile.options,
        **target.launch_options,
    )
    if splits > 1:
        _combine[(heads, rows)](
            mixed,
            stats,
            call.sinks_or_any,
            out,
            splits,
            HEADS=heads,
            DIM=dim,
            BLOCK_D=constants["BLOCK_D"],
            BLOCK_S=_MAX_SPLITS,
            SINKS=constants["SINKS"],
            num_warps=2,
            **target.launch_options,
        )


def _attend_chunks(call: _Call, out: torch.Tensor) -> None:
    query, kv, block_table, target = call.query, call.kv, call.block_table, call.target
    constants, batch = call.constants, call.batch
    sequences, singles = batch.context_lens.shape[0], batch.num_single
    kv_heads, group, dim = constants["KV_HEADS"], constants["GROUP"], constants["DIM"]
    tile = target.tiles.prefill if dim <= 64 else target.tiles.prefill_wide
    tile = for_dtype(tile, query.dtype)
    height = max(tile.m, triton.next_power_of_2(group))
    blocks = (query.shape[0] - singles) // (height // group) + sequences - singles
    _prefill[(kv_heads, blocks)](
        query,
        kv,
        kv.stride(0),
        block_table,
        block_table.stride(0),
        batch.cu_seqlens_q,
        batch.context_lens,
        call.sinks_or_any,
        out,
        singles,
        sequences,
        BLOCK_M=height,
        BLOCK_N=tile.n,
        **constants,
        **tile.options,
        **target.launch_options,
    )
