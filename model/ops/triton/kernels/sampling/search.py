"""Search a list of logits for the token at which a count or a probability is reached.

Tokens are in the order of their keys, which are integers that rise as logits fall, and equal keys
in the order of ids. A search is a radix select: each pass sums the number and the probability of
tokens by the next digit of their keys, and so finds a digit.

Key 0 is the largest logit's own. From there a key is the logarithm of the probability in steps of
about 2⁻¹¹, down to where probabilities are 0: logits that are closer than that have one key. With
exact keys there would be twice as many passes.

Probabilities are integers in units of 2⁻⁴² of the most likely token's; smaller ones become 0. Their
sum does not depend on the order of addition. So tokens may be in any order, and rounding cannot
make two passes differ.
"""

import triton
import triton.language as tl

_BITS = tl.constexpr(2)  # of a digit: so few that a thread's counters fit in its registers
_DIGITS = tl.constexpr(4)
_KEY_BITS = tl.constexpr(16)
_LARGEST = tl.constexpr(3.0e38)  # a scale of infinity would make NaN of equal logits


@triton.jit
def key_scale(temperature):
    """Return the number of keys in a logit."""
    return tl.minimum(2240.0 / temperature, _LARGEST)


@triton.jit
def log_scale(temperature):
    """Return the factor from logits to binary logarithms of probabilities."""
    return tl.minimum(1.4426950408889634 / temperature, _LARGEST)


@triton.jit
def key_steps(logits, highest, scale):
    """Return the keys of `token_keys` before they are rounded up, but of `highest` itself 0."""
    # 65533 steps down to e^-29.25, which is below 2⁻⁴².
    return tl.minimum((highest - logits) * scale, 65533.0)


@triton.jit
def token_keys(logits, highest, temperature):
    """Return int32 keys of 16 bits that rise as logits fall; 0 is the key of `highest` alone."""
    steps = key_steps(logits, highest, key_scale(temperature)).to(tl.int32)
    return tl.where(logits == highest, 0, steps + 1)


@triton.jit
def mass_of(logits, highest, log2_scale):
    """Return probabilities as int64 in units of 2⁻⁴² of that of the logit `highest`."""
    return (tl.exp2((logits - highest) * log2_scale) * 4398046511104.0).to(tl.int64)


@triton.jit
def _load(logits_ptr, at, size):
    return tl.load(logits_ptr + at, at < size, other=float("-inf")).to(tl.float32)


@triton.jit
def search(logits_ptr, size, highest, temperature, by_count, target, CHUNK: tl.constexpr):
    """Find the key at which the cumulative count, or else the probability, passes the target.

    logits [size] → (key, count and probability of the tokens before it, and of its own tokens).
    """
    digits = tl.arange(0, _DIGITS)
    log2_scale = log_scale(temperature)
    key = 0
    count = tl.full((), 0, tl.int64)
    mass, equals, equal_mass = count, count, count
    for i in range(1, _KEY_BITS // _BITS + 1):
        shift = _KEY_BITS - _BITS * i
        digit_counts = tl.zeros((CHUNK, _DIGITS), tl.int32)
        digit_masses = tl.zeros((CHUNK, _DIGITS), tl.int64)
        for start in range(0, size, CHUNK):
            # Each thread counts separately; sums over threads are computed once, at the end.
            at = start + tl.arange(0, CHUNK)
            logits = _load(logits_ptr, at, size)
            prefix = token_keys(logits, highest, temperature) >> shift
            has_prefix = (prefix >> _BITS == key) & (at < size)
            if tl.max(has_prefix.to(tl.int32), 0) > 0:
                digit = tl.where(has_prefix, prefix & (_DIGITS - 1), -1)
                is_digit = digit[:, None] == digits[None, :]
                digit_counts += is_digit.to(tl.int32)
                masses = mass_of(logits, highest, log2_scale)
                digit_masses += tl.where(is_digit, masses[:, None], 0)
        counts, masses = tl.sum(digit_counts, 0).to(tl.int64), tl.sum(digit_masses, 0)
        cumulative = tl.where(by_count, count, mass) + tl.cumsum(tl.where(by_count, counts, masses))
        found = tl.sum((cumulative <= target).to(tl.int32), 0)
        count += tl.sum(tl.where(digits < found, counts, 0), 0)
        mass += tl.sum(tl.where(digits < found, masses, 0), 0)
        equals = tl.sum(tl.where(digits == found, counts, 0), 0)
        equal_mass = tl.sum(tl.where(digits == found, masses, 0), 0)
        key = key * _DIGITS + found
    return key, count, mass, equals, equal_mass


@triton.jit
def find_among_equals(
    logits_ptr,
    ids_ptr,
    has_ids,
    size,
    highest,
    temperature,
    key,
    rank,
    equals,
    vocab,
    CHUNK: tl.constexpr,
):
    """Return as int64 the id of the token of a rank among those with a key, in the order of ids.

    logits [size], in any order; ids int32 [size] if has_ids, else an id is the index; equals: the
    number of tokens with the key. The id is bisected, or known if it is the only one.
    """
    low, high = 0, vocab - 1
    while low < high:
        middle = (low + high) // 2
        before = tl.zeros((CHUNK,), tl.int32)
        total = tl.zeros((CHUNK,), tl.int64)
        for start in range(0, size, CHUNK):
            at = start + tl.arange(0, CHUNK)
            logits = _load(logits_ptr, at, size)
            is_equal = (token_keys(logits, highest, temperature) == key) & (at < size)
            ids = at
            if has_ids:
                ids = tl.load(ids_ptr + at, is_equal, other=0)
            before += (is_equal & (ids <= middle)).to(tl.int32)
            total += tl.where(is_equal, ids, 0)
        if equals == 1:
            low = tl.sum(total, 0).to(tl.int32)
            high = low
        elif tl.sum(before, 0) > rank:
            high = middle
        else:
            low = middle + 1
    return tl.cast(low, tl.int64)


@triton.jit
def _top_p_target(top_p, total):
    """Return the largest sum of probabilities that does not reach the fraction p of the total."""
    target = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64) - 1
    return tl.minimum(tl.maximum(target, 0), total - 1)


@triton.jit
def sample_truncated(
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
