"""Maxima and probabilities of blocks of tokens, from which the sampling kernels start."""

import triton
import triton.language as tl

from model.ops.triton.kernels.sampling.search import log_scale
from model.ops.triton.programmatic_launch import wait_for_previous_kernel

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load_logits(logits_ptr, at, end):
    """Load the logits at indices `at`, -inf from `end` on; NaN becomes inf, as both are errors."""
    logits = tl.load(logits_ptr + at, at < end, other=float("-inf")).to(tl.float32)
    return tl.where(logits == logits, logits, float("inf"))


@triton.jit
def load_maxima(maxima_ptr, row, blocks, PARTS: tl.constexpr):
    """Load the maxima [PARTS] of a row's blocks."""
    part = tl.arange(0, PARTS)
    return tl.load(maxima_ptr + row * blocks + part, part < blocks, other=float("-inf"))


@triton.jit
def load_sums(sums_ptr, row, blocks, maxima, highest, temperature, PARTS: tl.constexpr):
    """Load the probabilities [PARTS] of a row's blocks, in units of its most likely token's."""
    part = tl.arange(0, PARTS)
    sums = tl.load(sums_ptr + row * blocks + part, part < blocks, other=0.0)
    return sums * tl.exp2((maxima - highest) * log_scale(temperature))


@triton.jit
def is_finite(highest):
    """Return whether a row can be sampled from, given its largest logit."""
    return (highest < _INFINITY) & (highest > -_INFINITY)


@triton.jit(
    do_not_specialize=["blocks_of_program"],
    do_not_specialize_on_alignment=["rows_ptr"],
)
def summarize_blocks(
    logits_ptr,
    rows_ptr,
    floats_ptr,
    maxima_ptr,
    sums_ptr,
    states_ptr,
    vocab,
    blocks,
    blocks_of_program,
    BLOCK: tl.constexpr,
    GREEDY: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Find the maximum of each block and the sum of its probabilities in units of the maximum's.

    Grid (n, programs of a row). logits [n, vocab] → maxima, sums float32 [n, blocks]; states int64
    [n, 2] are set to 0. Greedy rows have no sums; GREEDY: all rows are greedy.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = 0.0
    if not GREEDY:
        temperature = tl.load(floats_ptr + tl.load(rows_ptr + row) * 2)
        if program == 0:
            tl.store(states_ptr + row * 2 + tl.arange(0, 2), 0)
    first = program * blocks_of_program
    for block in range(first, tl.minimum(first + blocks_of_program, blocks)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        logits = load_logits(logits_ptr + row * vocab, at, vocab)
        highest = tl.max(logits, 0)
        tl.store(maxima_ptr + row * blocks + block, highest)
        if temperature > 0:
            probs = tl.exp2((logits - highest) * log_scale(temperature))
            # A block of -inf has no sum; one of NaN is not sampled from.
            sum_ = tl.where(is_finite(highest), tl.sum(probs, 0), 0.0)
            tl.store(sums_ptr + row * blocks + block, sum_)
