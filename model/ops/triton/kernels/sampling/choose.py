"""Sampling the rows of a step, greedy, from the whole vocabulary, or with top-k and top-p.

Three kernels, each in one launch for all rows, and each row by the parameters of its sequence:

1. `summarize_blocks` reads the logits once: the maximum of each block of tokens, and the sum of the
   probabilities in the block.
2. `list_candidates` reads the logits of rows with top-k or top-p a second time and writes the
   tokens that can be sampled at all to a list.
3. `choose_tokens`, one program a row, finds the token. For a greedy row it reads the block with the
   maximum. To sample from the whole vocabulary it selects a block by the sums, then reads that
   block. With top-k and top-p it searches the list (`search.py`), or the row if the list does not
   hold the tokens that it needs.

The last of these is decided by counts, on the device, and has no effect on the result: keys and
probabilities are integers, and a search among the tokens of all keys up to some key finds the same
token as a search in the row if its target lies below their sum. The list only makes it fast. Its
largest key comes from one of two bounds.

- Top-k: the k-th largest of the blocks' maxima is a lower bound of the k-th largest logit.
- Top-p: let P be the sum of all probabilities, in units of the largest, and V the number of tokens.
  If a token's probability is at most (1 - p) · P / V, then it and all tokens after it sum up to at
  most (1 - p) · P. So the tokens before it reach p · P, and it is not among those kept.

Of 150,000 logits of a language model a few hundred are left.
"""

import triton
import triton.language as tl

from model.ops.triton.kernels.sampling.search import log_scale, mass_of, sample_truncated
from model.ops.triton.kernels.sampling.vocabulary_blocks import (
    is_finite,
    load_logits,
    load_maxima,
    load_sums,
)
from model.ops.triton.programmatic_launch import wait_for_previous_kernel


@triton.jit
def _first_of_maximum(logits_ptr, maxima, highest, vocab, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Find the first token with the largest logit of a row."""
    part, at = tl.arange(0, PARTS), tl.arange(0, BLOCK)
    start = tl.min(tl.where(maxima == highest, part, PARTS), 0) * BLOCK
    logits = load_logits(logits_ptr, start + at, vocab)
    return (start + tl.min(tl.where(logits == highest, at, BLOCK - 1), 0)).to(tl.int64)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30 & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ (x >> 27 & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ (x >> 31 & ((1 << 33) - 1))


@triton.jit
def _keyed_uniform(seed, position):
    """Return the number of `model.ops.sampling.keyed_uniform`, bit for bit."""
    bits = _mix(_mix(seed) + position * -7046029254386353131)
    return (bits >> 11 & ((1 << 53) - 1)).to(tl.float64) * 1.1102230246251565e-16  # 2⁻⁵³


@triton.jit
def _find_in(masses, target, SIZE: tl.constexpr):
    """Find where the cumulative sum of masses int64 [SIZE] passes the target.

    Returns (the index, the part of the target that is left there, the mass there).
    """
    index = tl.arange(0, SIZE)
    found = tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32), 0)
    left = target - tl.sum(tl.where(index < found, masses, 0), 0)
    return found, left, tl.sum(tl.where(index == found, masses, 0), 0)


@triton.jit
def _sample_vocabulary(
    logits_ptr,
    maxima_ptr,
    sums,
    uniform,
    temperature,
    vocab,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Sample from all tokens of a row in the order of their ids.

    sums float32 [PARTS]: the probability of each block. First by block, then within the block in
    proportion to the block's own sum, which is rounded in another way.
    """
    masses = (sums * 4398046511104.0).to(tl.int64)
    total = tl.sum(masses, 0)
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    block, left, mass = _find_in(masses, target, PARTS)
    logits = load_logits(logits_ptr, block * BLOCK + tl.arange(0, BLOCK), vocab)
    within = mass_of(logits, tl.load(maxima_ptr + block), log_scale(temperature))
    total = tl.sum(within, 0)
    share = left.to(tl.float64) / mass.to(tl.float64)
    target = tl.minimum((share * total.to(tl.float64)).to(tl.int64), total - 1)
    offset, _, _ = _find_in(within, target, BLOCK)
    return (block * BLOCK + offset).to(tl.int64)


@triton.jit(
    do_not_specialize=["capacity"],
    do_not_specialize_on_alignment=["rows_ptr", "positions_ptr"],
)
def choose_tokens(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    floats_ptr,
    ints_ptr,
    maxima_ptr,
    sums_ptr,
    states_ptr,
    listed_logits_ptr,
    listed_ids_ptr,
    tokens_ptr,
    last_ptr,
    vocab,
    blocks,
    capacity,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    GREEDY: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Choose the token of each row; grid (n,).

    Writes it to tokens int64 [n], or -1 where the largest logit is not finite, and a valid token
    to `last` at the sequence's row. GREEDY: all rows are greedy.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row = tl.program_id(0).to(tl.int64)
    index = tl.load(rows_ptr + row)
    logits_ptr += row * vocab
    maxima = load_maxima(maxima_ptr, row, blocks, PARTS)
    highest = tl.max(maxima, 0)
    has_finite_logits = is_finite(highest)
    token = _first_of_maximum(logits_ptr, maxima, highest, vocab, BLOCK, PARTS)
    if not GREEDY:
        temperature, top_p = tl.load(floats_ptr + index * 2), tl.load(floats_ptr + index * 2 + 1)
        top_k, seed = tl.load(ints_ptr + index * 2), tl.load(ints_ptr + index * 2 + 1)
        uniform = _keyed_uniform(seed, tl.load(positions_ptr + row).to(tl.int64))
        if (temperature > 0) & has_finite_logits:
            if (top_k > 0) | (top_p < 1):
                token = sample_truncated(
                    logits_ptr,
                    listed_logits_ptr + row * capacity,
                    listed_ids_ptr + row * capacity,
                    states_ptr + row * 2,
                    highest,
                    temperature,
                    top_k,
                    top_p,
                    uniform,
                    vocab,
                    capacity,
                    CHUNK,
                )
            else:
                sums = load_sums(sums_ptr, row, blocks, maxima, highest, temperature, PARTS)
                token = _sample_vocabulary(
                    logits_ptr,
                    maxima_ptr + row * blocks,
                    sums,
                    uniform,
                    temperature,
                    vocab,
                    BLOCK,
                    PARTS,
                )
    token = tl.minimum(token, vocab - 1)
    tl.store(last_ptr + index, token)
    tl.store(tokens_ptr + row, tl.where(has_finite_logits, token, -1))
