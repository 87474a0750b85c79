"""Rows of the embedding, scaled, as the start of the residual stream."""

import torch
import triton
import triton.language as tl

from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.tiles import Target


@triton.jit(do_not_specialize=["first", "rows"])
def _embed(
    table_ptr,
    ids_ptr,
    out_ptr,
    first,
    rows,
    scale,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """A block of the row of one token; grid (tokens, ⌈SIZE / BLOCK⌉).

    table [rows, SIZE] has the tokens from `first` on; ids int64 [tokens] → out float32
    [tokens, SIZE].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token) - first
    is_here = (row >= 0) & (row < rows)
    x = tl.load(table_ptr + row * SIZE + at, is_here & (at < SIZE), other=0.0)
    tl.store(out_ptr + token * SIZE + at, x.to(tl.float32) * scale, at < SIZE)


def embed(
    table: torch.Tensor, ids: torch.Tensor, scale: float, first: int, target: Target
) -> torch.Tensor:
    """As `Backend.embed`."""
    rows, size = table.shape
    out = table.new_empty(len(ids), size, dtype=torch.float32)
    if len(ids):
        block = min(1024, triton.next_power_of_2(size))
        _embed[(len(ids), triton.cdiv(size, block))](
            table,
            ids,
            out,
            first,
            rows,
            float(scale),
            SIZE=size,
            BLOCK=block,
            num_warps=4,
            **target.launch_options,
        )
    return out
