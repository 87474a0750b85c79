"""Rows grouped by expert, on the device: no count ever comes back to the host.

A pair is (token, one of its top_k experts), numbered token · top_k + rank. Pairs are sorted by
expert, stably, so that what is computed does not depend on the order in which programs run. Those
whose expert is not one of EXPERTS from `first` on are left out.
"""

import torch
import triton
import triton.language as tl

from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.tiles import Target

_CHUNK = 128  # pairs that one program sorts


@triton.jit(do_not_specialize=["first", "pairs"])
def _count(
    chosen_ptr,
    counts_ptr,
    first,
    pairs,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """counts int32 [chunks, BLOCK_E]: pairs of each expert in each chunk."""
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.arange(0, BLOCK_E)
    mine = tl.load(chosen_ptr + at, at < pairs, other=-1).to(tl.int32) - first
    found = tl.sum((mine[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + tl.program_id(0) * BLOCK_E + expert, found)


@triton.jit(do_not_specialize=["first", "pairs", "chunks"])
def _sort(
    chosen_ptr,
    counts_ptr,
    order_ptr,
    starts_ptr,
    first,
    pairs,
    chunks,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """A chunk's pairs put where they belong; ALONE: it is the only one and counts for itself.

    order int32 [pairs]: pairs by expert; starts int32 [EXPERTS + 1]: where each expert's begin.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    own = tl.program_id(0)
    turn = tl.arange(0, CHUNK)
    expert = tl.arange(0, BLOCK_E)
    at = own * CHUNK + turn
    mine = tl.load(chosen_ptr + at, at < pairs, other=-1).to(tl.int32) - first
    if ALONE:
        total = tl.sum((mine[:, None] == expert[None, :]).to(tl.int32), 0)
        earlier = tl.zeros((BLOCK_E,), tl.int32)
    else:
        total = tl.zeros((BLOCK_E,), tl.int32)
        earlier = tl.zeros((BLOCK_E,), tl.int32)
        for c in range(0, chunks, BLOCK_C):
            chunk = c + tl.arange(0, BLOCK_C)
            source = counts_ptr + chunk[:, None] * BLOCK_E + expert[None, :]
            counts = tl.load(source, (chunk < chunks)[:, None], other=0)
            total += tl.sum(counts, 0)
            earlier += tl.sum(tl.where((chunk < own)[:, None], counts, 0), 0)
    start = tl.cumsum(total, 0) - total
    if own == 0:
        tl.store(starts_ptr + expert, start, expert < EXPERTS)
        tl.store(starts_ptr + EXPERTS, tl.sum(tl.where(expert < EXPERTS, total, 0), 0))
    here = (mine >= 0) & (mine < EXPERTS)
    base = tl.gather(start + earlier, tl.where(here, mine, 0), 0)
    equals = (mine[:, None] == mine[None, :]) & (turn[None, :] < turn[:, None])
    tl.store(order_ptr + base + tl.sum(equals.to(tl.int32), 1), at, here)


def group_by_expert(
    chosen: torch.Tensor, first: int, experts: int, target: Target
) -> tuple[torch.Tensor, torch.Tensor]:
    """chosen [tokens, top_k] → (order int32 [tokens · top_k], starts int32 [experts + 1]).

    Behind the last of `starts` nothing is written to `order`.
    """
    pairs, block_e = chosen.numel(), triton.next_power_of_2(experts)
    chunks = triton.cdiv(pairs, _CHUNK)
    order = chosen.new_empty(pairs, dtype=torch.int32)
    starts = chosen.new_empty(experts + 1, dtype=torch.int32)
    counts = order
    if chunks > 1:
        counts = chosen.new_empty(chunks, block_e, dtype=torch.int32)
        _count[(chunks,)](
            chosen,
            counts,
            first,
            pairs,
            BLOCK_E=block_e,
            CHUNK=_CHUNK,
            num_warps=4,
            **target.launch_options,
        )
    _sort[(chunks,)](
        chosen,
        counts,
        order,
        starts,
        first,
        pairs,
        chunks,
        EXPERTS=experts,
        BLOCK_E=block_e,
        CHUNK=_CHUNK,
        ALONE=chunks == 1,
        BLOCK_C=32,
        num_warps=16,
        **target.launch_options,
    )
    return order, starts
