"""Sort (token, expert) pairs by expert on the device, so that no count is read by the host.

A token has top_k pairs, numbered token · top_k + rank. The sort is stable, so that results do not
depend on the order in which programs run. Pairs whose expert is not one of the EXPERTS from `first`
on, which another rank holds, are left out.
"""

import torch
import triton
import triton.language as tl

from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.tiles import Target

_CHUNK = 128  # pairs that one program sorts


@triton.jit
def store_sorted(
    order_ptr,
    expert_starts_ptr,
    pair,
    local_expert,
    total,
    earlier,
    chunk_id,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Store a chunk's pairs [CHUNK] at their sorted places; the first chunk stores the starts.

    total, earlier [BLOCK_E]: pairs of each expert in all chunks and in those before this one.
    """
    expert, lane = tl.arange(0, BLOCK_E), tl.arange(0, CHUNK)
    start = tl.cumsum(total, 0) - total
    if chunk_id == 0:
        tl.store(expert_starts_ptr + expert, start, expert < EXPERTS)
        tl.store(expert_starts_ptr + EXPERTS, tl.sum(tl.where(expert < EXPERTS, total, 0), 0))
    is_held = (local_expert >= 0) & (local_expert < EXPERTS)
    base = tl.gather(start + earlier, tl.where(is_held, local_expert, 0), 0)
    equals = (local_expert[:, None] == local_expert[None, :]) & (lane[None, :] < lane[:, None])
    tl.store(order_ptr + base + tl.sum(equals.to(tl.int32), 1), pair, is_held)


@triton.jit(do_not_specialize=["first", "pairs"])
def _count_by_expert(
    chosen_ptr,
    counts_ptr,
    first,
    pairs,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Count the pairs of each expert in a chunk: counts int32 [chunks, BLOCK_E]; grid (chunks,)."""
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.arange(0, BLOCK_E)
    local_expert = tl.load(chosen_ptr + pair, pair < pairs, other=-1).to(tl.int32) - first
    counts = tl.sum((local_expert[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + tl.program_id(0) * BLOCK_E + expert, counts)


@triton.jit(do_not_specialize=["first", "pairs", "chunks"])
def _sort_by_expert(
    chosen_ptr,
    counts_ptr,
    order_ptr,
    expert_starts_ptr,
    first,
    pairs,
    chunks,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    SINGLE_CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Write a chunk's pairs to their sorted places; grid (chunks,).

    order int32 [pairs]: pairs sorted by expert; expert_starts int32 [EXPERTS + 1]: index of each
    expert's first pair in it. SINGLE_CHUNK: there are no counts, the program counts by itself.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    chunk_id = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    pair = chunk_id * CHUNK + tl.arange(0, CHUNK)
    local_expert = tl.load(chosen_ptr + pair, pair < pairs, other=-1).to(tl.int32) - first
    if SINGLE_CHUNK:
        total = tl.sum((local_expert[:, None] == expert[None, :]).to(tl.int32), 0)
        earlier = tl.zeros((BLOCK_E,), tl.int32)
    else:
        total = tl.zeros((BLOCK_E,), tl.int32)
        earlier = tl.zeros((BLOCK_E,), tl.int32)
        for c in range(0, chunks, BLOCK_C):
            chunk = c + tl.arange(0, BLOCK_C)
            source = counts_ptr + chunk[:, None] * BLOCK_E + expert[None, :]
            counts = tl.load(source, (chunk < chunks)[:, None], other=0)
            total += tl.sum(counts, 0)
            earlier += tl.sum(tl.where((chunk < chunk_id)[:, None], counts, 0), 0)
    store_sorted(
        order_ptr, expert_starts_ptr, pair, local_expert, total, earlier, chunk_id,
        EXPERTS, BLOCK_E, CHUNK,
    )  # fmt: skip


def sort_by_expert(
    chosen: torch.Tensor, first: int, experts: int, target: Target
) -> tuple[torch.Tensor, torch.Tensor]:
    """chosen [tokens, top_k] → (order int32 [tokens · top_k], expert_starts int32 [experts + 1]).

    From index expert_starts[experts] on `order` is not initialised.
    """
    pairs, block_e = chosen.numel(), triton.next_power_of_2(experts)
    chunks = triton.cdiv(pairs, _CHUNK)
    order = chosen.new_empty(pairs, dtype=torch.int32)
    expert_starts = chosen.new_empty(experts + 1, dtype=torch.int32)
    counts = order
    if chunks > 1:
        counts = chosen.new_empty(chunks, block_e, dtype=torch.int32)
        _count_by_expert[(chunks,)](
            chosen,
            counts,
            first,
            pairs,
            BLOCK_E=block_e,
            CHUNK=_CHUNK,
            num_warps=4,
            **target.launch_options,
        )
    _sort_by_expert[(chunks,)](
        chosen,
        counts,
        order,
        expert_starts,
        first,
        pairs,
        chunks,
        EXPERTS=experts,
        BLOCK_E=block_e,
        CHUNK=_CHUNK,
        SINGLE_CHUNK=chunks == 1,
        BLOCK_C=32,
        num_warps=16,
        **target.launch_options,
    )
    return order, expert_starts
