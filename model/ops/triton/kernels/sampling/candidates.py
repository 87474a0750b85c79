"""The tokens of a row that top-k and top-p may keep, written to a list; see sampling.py."""

import triton
import triton.language as tl

from model.ops.triton.kernels.sampling.search import (
    key_scale,
    key_steps,
    log_scale,
    mass_of,
    token_keys,
)
from model.ops.triton.kernels.sampling.vocabulary_blocks import (
    is_finite,
    load_logits,
    load_maxima,
    load_sums,
)
from model.ops.triton.programmatic_launch import wait_for_previous_kernel

_SLACK = tl.constexpr(8.0)  # keys by which the bound of top-p exceeds its rounding errors
_HIGHEST_KEY = tl.constexpr(65536.0)  # above every key


@triton.jit
def _key_of_rank(maxima, highest, temperature, rank):
    """Find the smallest key that at least `rank` of the maxima have or are below."""
    keys = token_keys(maxima, highest, temperature)
    key = 0
    for i in range(16):
        middle = key + (32768 >> i)
        key = tl.where(tl.sum((keys < middle).to(tl.int32), 0) < rank, middle, key)
    return key


@triton.jit(
    do_not_specialize=["blocks_of_program", "capacity"],
    do_not_specialize_on_alignment=["rows_ptr"],
)
def list_candidates(
    logits_ptr,
    rows_ptr,
    floats_ptr,
    ints_ptr,
    maxima_ptr,
    sums_ptr,
    states_ptr,
    listed_logits_ptr,
    listed_ids_ptr,
    vocab,
    blocks,
    blocks_of_program,
    capacity,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """List the tokens of small keys of each row with top-k or top-p, in any order.

    Grid (n, programs of a row). listed_logits float32, listed_ids int32 [n, capacity]; states int64
    [n, 2], 0 before: tokens of the list, which may exceed its capacity, and, of rows without top-k,
    the probability of all tokens.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = tl.load(rows_ptr + row)
    temperature, top_p = tl.load(floats_ptr + index * 2), tl.load(floats_ptr + index * 2 + 1)
    top_k = tl.load(ints_ptr + index * 2)
    maxima = load_maxima(maxima_ptr, row, blocks, PARTS)
    highest = tl.max(maxima, 0)
    is_truncated = (top_k > 0) | (top_p < 1)
    if (temperature > 0) & is_truncated & is_finite(highest):
        sums = load_sums(sums_ptr, row, blocks, maxima, highest, temperature, PARTS)
        # With top-k, the total is that of the kept tokens: at least 1, the most likely one.
        total = tl.where(top_k > 0, 1.0, tl.sum(sums, 0))
        left = tl.maximum((1 - top_p) * total, 1.0e-30)  # whose logarithm is finite
        bound = tl.ceil(2240.0 * (tl.log(tl.cast(vocab, tl.float32)) - tl.log(left)))
        bound = tl.minimum(bound + _SLACK, _HIGHEST_KEY)
        if (top_k > 0) & (top_k <= blocks):
            bound = _key_of_rank(maxima, highest, temperature, top_k).to(tl.float32)
        scale, log2_scale = key_scale(temperature), log_scale(temperature)
        masses = tl.zeros((BLOCK,), tl.int64)
        first = program * blocks_of_program
        for block in range(first, tl.minimum(first + blocks_of_program, blocks)):
            at = block * BLOCK + tl.arange(0, BLOCK)
            block_highest = tl.load(maxima_ptr + row * blocks + block)
            steps = key_steps(block_highest, highest, scale)
            if (steps < bound) | (block_highest == highest) | (top_k <= 0):
                logits = load_logits(logits_ptr + row * vocab, at, vocab)
                # A key is the next integer above its steps: it is at most `bound`.
                kept = (key_steps(logits, highest, scale) < bound) | (logits == highest)
                kept = (kept & (at < vocab)).to(tl.int32)
                count = tl.sum(kept, 0)
                if count > 0:
                    place = tl.atomic_add(states_ptr + row * 2, count.to(tl.int64), sem="relaxed")
                    place = place.to(tl.int32) + tl.cumsum(kept, 0) - 1
                    is_stored = (kept > 0) & (place < capacity)
                    tl.store(listed_logits_ptr + row * capacity + place, logits, is_stored)
                    tl.store(listed_ids_ptr + row * capacity + place, at, is_stored)
                if top_k <= 0:
                    masses += mass_of(logits, highest, log2_scale)
        if top_k <= 0:
            tl.atomic_add(states_ptr + row * 2 + 1, tl.sum(masses, 0), sem="relaxed")
