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

from model.ops.triton.kernels.search import (
    find_among_equals,
    key_scale,
    log_scale,
    mass_of,
    search,
    token_keys,
)
from model.ops.triton.programmatic_launch import wait_for_previous_kernel

_INFINITY = tl.constexpr(float("inf"))
_SLACK = tl.constexpr(8.0)  # keys by which the bound of top-p exceeds its rounding errors
_HIGHEST_KEY = tl.constexpr(65536.0)  # above every key


@triton.jit
def _load_logits(logits_ptr, at, end):
    """Load the logits at indices `at`, -inf from `end` on; NaN becomes inf, as both are errors."""
    logits = tl.load(logits_ptr + at, at < end, other=float("-inf")).to(tl.float32)
    return tl.where(logits == logits, logits, float("inf"))


@triton.jit
def _load_maxima(maxima_ptr, row, blocks, PARTS: tl.constexpr):
    """Load the maxima [PARTS] of a row's blocks."""
    part = tl.arange(0, PARTS)
    return tl.load(maxima_ptr + row * blocks + part, part < blocks, other=float("-inf"))


@triton.jit
def _load_sums(sums_ptr, row, blocks, maxima, highest, temperature, PARTS: tl.constexpr):
    """Load the probabilities [PARTS] of a row's blocks, in units of its most likely token's."""
    part = tl.arange(0, PARTS)
    sums = tl.load(sums_ptr + row * blocks + part, part < blocks, other=0.0)
    return sums * tl.exp2((maxima - highest) * log_scale(temperature))


@triton.jit
def _is_finite(highest):
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
        logits = _load_logits(logits_ptr + row * vocab, at, vocab)
        highest = tl.max(logits, 0)
        tl.store(maxima_ptr + row * blocks + block, highest)
        if temperature > 0:
            probs = tl.exp2((logits - highest) * log_scale(temperature))
            # A block of -inf has no sum; one of NaN is not sampled from.
            sum_ = tl.where(_is_finite(highest), tl.sum(probs, 0), 0.0)
            tl.store(sums_ptr + row * blocks + block, sum_)


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
    maxima = _load_maxima(maxima_ptr, row, blocks, PARTS)
    highest = tl.max(maxima, 0)
    is_truncated = (top_k > 0) | (top_p < 1)
    if (temperature > 0) & is_truncated & _is_finite(highest):
        sums = _load_sums(sums_ptr, row, blocks, maxima, highest, temperature, PARTS)
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
            has_candidates = ((highest - block_highest) * scale < bound) | (
                block_highest == highest
            )
            if has_candidates | (top_k <= 0):
                logits = _load_logits(logits_ptr + row * vocab, at, vocab)
                # A key is the integer above: it is at most `bound`.
                kept = ((highest - logits) * scale < bound) | (logits == highest)
                kept = (kept & (at < vocab)).to(tl.int32)
                count = tl.sum(kept, 0)
                if count > 0:
                    place = tl.atomic_add(states_ptr + row * 2, count.to(tl.int64))
                    place += tl.cumsum(kept, 0) - 1
                    is_stored = (kept > 0) & (place < capacity)
                    place += row * capacity
                    tl.store(listed_logits_ptr + place, logits, is_stored)
                    tl.store(listed_ids_ptr + place, at, is_stored)
                if top_k <= 0:
                    masses += mass_of(logits, highest, log2_scale)
        if top_k <= 0:
            tl.atomic_add(states_ptr + row * 2 + 1, tl.sum(masses, 0))


@triton.jit
def _first_of_maximum(logits_ptr, maxima, highest, vocab, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Find the first token with the largest logit of a row."""
    part, at = tl.arange(0, PARTS), tl.arange(0, BLOCK)
    start = tl.min(tl.where(maxima == highest, part, PARTS), 0) * BLOCK
    logits = _load_logits(logits_ptr, start + at, vocab)
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
    logits = _load_logits(logits_ptr, block * BLOCK + tl.arange(0, BLOCK), vocab)
    within = mass_of(logits, tl.load(maxima_ptr + block), log_scale(temperature))
    total = tl.sum(within, 0)
    share = left.to(tl.float64) / mass.to(tl.float64)
    target = tl.minimum((share * total.to(tl.float64)).to(tl.int64), total - 1)
    offset, _, _ = _find_in(within, target, BLOCK)
    return (block * BLOCK + offset).to(tl.int64)


@triton.jit
def _top_p_target(top_p, total):
    """Return the largest sum of probabilities that does not reach the fraction p of the total."""
    target = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64) - 1
    return tl.minimum(tl.maximum(target, 0), total - 1)


@triton.jit
def _sample_truncated(
    logits_ptr,
    listed_logits_ptr,
    listed_ids_ptr,
    state_ptr,
    highest,
    temperature,
    top_k,
    top_p,
    uniform,
    vocab,
    capacity,
    CHUNK: tl.constexpr,
):
    """Sample from the tokens of a row that top-k and top-p keep, by up to three searches.

    A search for the last token that top-k keeps, in terms of their number, yields the probability
    that is kept. A search for a fraction p of that yields the last token that top-p keeps. A
    search for a uniform fraction of what both keep yields the sampled token.
    """
    size, kept = tl.load(state_ptr), tl.load(state_ptr + 1)
    fits = size <= capacity
    if top_k > 0:
        fits = fits & (size >= tl.minimum(top_k, vocab))
    elif fits:
        mass = tl.zeros((CHUNK,), tl.int64)
        for start in range(0, size.to(tl.int32), CHUNK):
            at = start + tl.arange(0, CHUNK)
            logits = tl.load(listed_logits_ptr + at, at < size, other=float("-inf"))
            mass += mass_of(logits, highest, log_scale(temperature))
        fits = _top_p_target(top_p, kept) < tl.sum(mass, 0)
    size = tl.where(fits, size, vocab).to(tl.int32)
    source = logits_ptr
    if fits:
        source = listed_logits_ptr
    key, left, equals = 0, kept * 0, kept * 0
    for goal in range(tl.where(top_k > 0, 0, 1), 3):
        if goal == 0:
            target = tl.minimum(top_k, vocab) - 1
        elif goal == 1:
            target = _top_p_target(top_p, kept)
        else:
            target = (uniform * kept.to(tl.float64)).to(tl.int64)
            target = tl.minimum(tl.maximum(target, 0), kept - 1)
        key, count, mass, equals, equal_mass = search(
            source, size, highest, temperature, goal == 0, target, CHUNK
        )
        # Tokens with one key are told apart by count, as if they were equally likely. Where the
        # key's probabilities end, one may be 0.
        each = equal_mass // tl.maximum(equals, 1)
        left = tl.where(goal == 0, target - count, (target - mass) // tl.maximum(each, 1))
        left = tl.minimum(left, equals - 1)
        kept = mass + tl.where(left + 1 == equals, equal_mass, (left + 1) * each)
    return find_among_equals(
        source, listed_ids_ptr, fits, size, highest, temperature, key, left, equals, vocab, CHUNK
    )


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
    maxima = _load_maxima(maxima_ptr, row, blocks, PARTS)
    highest = tl.max(maxima, 0)
    is_finite = _is_finite(highest)
    token = _first_of_maximum(logits_ptr, maxima, highest, vocab, BLOCK, PARTS)
    if not GREEDY:
        temperature, top_p = tl.load(floats_ptr + index * 2), tl.load(floats_ptr + index * 2 + 1)
        top_k, seed = tl.load(ints_ptr + index * 2), tl.load(ints_ptr + index * 2 + 1)
        uniform = _keyed_uniform(seed, tl.load(positions_ptr + row).to(tl.int64))
        if (temperature > 0) & is_finite:
            if (top_k > 0) | (top_p < 1):
                token = _sample_truncated(
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
                sums = _load_sums(sums_ptr, row, blocks, maxima, highest, temperature, PARTS)
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
    tl.store(tokens_ptr + row, tl.where(is_finite, token, -1))
