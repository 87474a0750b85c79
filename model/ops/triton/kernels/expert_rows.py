"""Rows of grouped matrix products: which expert a row block belongs to, and its rows' values."""

import triton
import triton.language as tl


@triton.jit
def find_row_block(
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
def load_rows(source, at, inside, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
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
