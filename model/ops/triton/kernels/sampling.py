"""Top-k, top-p and sampling without a sort: each is a search in the order of probability.

The last token that top-k keeps is the one at which the cumulative count passes k. The last token
that top-p keeps is the one at which the cumulative probability passes a fraction of the probability
that top-k kept. The sampled token is the one at which it passes a uniform fraction of the
probability that both kept. So there are three searches of one kind, and each passes a single number
to the next.

A search is a radix select over keys, integers that rise as logits fall, with digits of four bits.
Each pass sums the count and the probability of the tokens by the next digit of their keys, and
every program of the next pass finds the digit from the sums over its row. A key has four digits,
and all searches share the sums of the first: 3 · 3 + 1 passes.

Key 0 is the largest logit's own. From there a key is the logarithm of the probability in steps of
2⁻¹¹, about, down to where probabilities are 0: logits that are closer than that have one key. With
exact keys there would be twice as many passes.

Probabilities are integers in units of 2⁻⁴² of the most likely token's; smaller ones become 0. Their
sum does not depend on the order of addition. So a row may be split over any number of programs
without changing the result, and rounding cannot make two passes differ. Tokens with equal keys
are told apart by count, as if they were equally likely; the lower token comes first.

One program a row would leave most of the device idle for small batches, and one kernel for all
passes would need programs that wait for each other, which is not portable. For small batches a row
stays in the L2 cache between passes. After the first pass, blocks without a token whose key has the
found prefix are only read.
"""

import triton
import triton.language as tl

from model.ops.triton.programmatic_launch import wait_for_previous_kernel


@triton.jit
def _load_logits(logits_ptr, at, end):
    """Load the logits at indices `at`, -inf from `end` on; NaN becomes -inf."""
    logits = tl.load(logits_ptr + at, at < end, other=float("-inf")).to(tl.float32)
    return tl.where(logits == logits, logits, float("-inf"))


@triton.jit
def _highest(highest_ptr, row, splits, SPLITS: tl.constexpr):
    """Load the largest logit of a row from the maxima of its spans."""
    part = tl.arange(0, SPLITS)
    tops = tl.load(highest_ptr + row * splits + part, part < splits, other=float("-inf"))
    return tl.max(tops, 0)


@triton.jit
def _keys(logits, highest, temperature):
    """Return int32 keys of 16 bits that rise as logits fall."""
    # 65533 steps down to e^-29.25, which is below 2⁻⁴².
    steps = tl.minimum((highest - logits) * (2240.0 / temperature), 65533.0)
    # The maximum is a case of its own because infinity minus infinity is NaN, and 0 · infinity.
    return tl.where(logits == highest, -1.0, steps).to(tl.int32) + 1


@triton.jit(do_not_specialize=["splits"])
def row_maxima(
    logits_ptr,
    highest_ptr,
    vocab,
    span,
    splits,
    BLOCK: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Find the maximum of each span of a row; grid (rows, splits).

    logits [rows, vocab] → highest float32 [rows, splits].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.minimum((split + 1) * span, vocab)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(split * span, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        highest = tl.maximum(highest, _load_logits(logits_ptr + row * vocab, at, end))
    tl.store(highest_ptr + row * splits + split, tl.max(highest, 0))


@triton.jit
def _find_digit(table_ptr, splits, by_count, count, mass, target, SPLITS: tl.constexpr):
    """Find the digit at which the cumulative count or probability passes the target.

    table int64 [splits, 2, 16]: count and probability of each digit; count, mass: of the tokens
    before the first digit → (digit, count and mass of the tokens before it, and of its own tokens).
    """
    split, digit = tl.arange(0, SPLITS), tl.arange(0, 16)
    source = table_ptr + split[:, None] * 32 + digit[None, :]
    inside = (split < splits)[:, None]
    counts = tl.sum(tl.load(source, inside, other=0), 0)
    masses = tl.sum(tl.load(source + 16, inside, other=0), 0)
    cumulative = tl.where(by_count, count, mass) + tl.cumsum(tl.where(by_count, counts, masses), 0)
    found = tl.sum((cumulative <= target).to(tl.int32), 0)
    count += tl.sum(tl.where(digit < found, counts, 0), 0)
    mass += tl.sum(tl.where(digit < found, masses, 0), 0)
    is_found = digit == found
    found_count = tl.sum(tl.where(is_found, counts, 0), 0)
    found_mass = tl.sum(tl.where(is_found, masses, 0), 0)
    return found, count, mass, found_count, found_mass


@triton.jit
def _search_target(
    goal,
    top_k_ptr,
    top_p_ptr,
    uniform_ptr,
    table_ptr,
    state_ptr,
    row,
    vocab,
    splits,
    SPLITS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
):
    """Return the target of a search, from the table and the state of the pass before it.

    That pass was the last of the previous search, or the first of all, as if top-k had kept all
    tokens.
    """
    if goal == TOP_K:
        top_k = tl.load(top_k_ptr + row)
        target = tl.where((top_k <= 0) | (top_k > vocab), vocab, top_k) - 1
    else:
        by_count = goal == TOP_P
        count, mass = tl.load(state_ptr + 1), tl.load(state_ptr + 2)
        last = tl.load(state_ptr + 3)
        _, count, mass, equals, equal_mass = _find_digit(
            table_ptr, splits, by_count, count, mass, last, SPLITS
        )
        each = equal_mass // equals
        # How many of the tokens that are equal to the last one kept are kept too.
        kept_equals = tl.where(by_count, last - count, (last - mass) // tl.maximum(each, 1)) + 1
        kept_equals = tl.minimum(kept_equals, equals)
        kept = mass + tl.where(kept_equals == equals, equal_mass, kept_equals * each)
        if by_count:
            top_p = tl.load(top_p_ptr + row).to(tl.float64)
            target = tl.ceil(top_p * kept.to(tl.float64)).to(tl.int64) - 1
        else:
            target = (tl.load(uniform_ptr + row) * kept.to(tl.float64)).to(tl.int64)
        target = tl.minimum(tl.maximum(target, 0), kept - 1)
    return target


@triton.jit(
    do_not_specialize=["splits", "step", "goal", "by_count", "shift"],
    # The parameters of a row are a column of a matrix, which may start at any address.
    do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "uniform_ptr"],
)
def count_digits(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    uniform_ptr,
    highest_ptr,
    tables_ptr,
    states_ptr,
    vocab,
    span,
    splits,
    step,
    goal,
    by_count,
    shift,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    SPLITS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """One pass: count and mass by the digit at `shift` of keys with the prefix found so far.

    Grid (rows, splits). tables int64 [steps, rows, splits, 2, 16]; states int64 [steps, rows, 4]:
    prefix, count and mass of the tokens before it, and the target, which is a count if by_count.
    goal: the purpose of the search that starts with this step, or 0.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.num_programs(0)
    prefix = row * 0
    count, mass, target = prefix, prefix, prefix + vocab - 1
    if step > 0:
        table_ptr = tables_ptr + ((step - 1) * rows + row) * splits * 32
        state_ptr = states_ptr + ((step - 1) * rows + row) * 4
        if goal > 0:
            target = _search_target(
                goal,
                top_k_ptr,
                top_p_ptr,
                uniform_ptr,
                table_ptr,
                state_ptr,
                row,
                vocab,
                splits,
                SPLITS,
                TOP_K,
                TOP_P,
            )
            table_ptr = tables_ptr + row * splits * 32
        else:
            prefix, count = tl.load(state_ptr), tl.load(state_ptr + 1)
            mass, target = tl.load(state_ptr + 2), tl.load(state_ptr + 3)
        digit, count, mass, _, _ = _find_digit(
            table_ptr, splits, by_count != 0, count, mass, target, SPLITS
        )
        prefix = prefix * 16 + digit
    if split == 0:
        state_ptr = states_ptr + (step * rows + row) * 4
        tl.store(state_ptr, prefix)
        tl.store(state_ptr + 1, count)
        tl.store(state_ptr + 2, mass)
        tl.store(state_ptr + 3, target)

    highest = _highest(highest_ptr, row, splits, SPLITS)
    temperature = tl.load(temperature_ptr + row)
    start = prefix.to(tl.int32)
    digits = tl.arange(0, 16)
    counts = tl.zeros((PART, 16), tl.int32)
    masses = tl.zeros((PART, 16), tl.int64)
    end = tl.minimum((split + 1) * span, vocab)
    for first in range(split * span, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        keys = _keys(_load_logits(logits_ptr + row * vocab, place, end), highest, temperature)
        has_prefix = ((keys >> shift >> 4) == start) & (place < end)
        if tl.max(has_prefix.to(tl.int32), 0) > 0:
            for offset in range(0, BLOCK, PART):
                # Each thread counts separately; sums over threads are computed once, at the end.
                at = first + offset + tl.arange(0, PART)[:, None]
                logits = _load_logits(logits_ptr + row * vocab, at, end)
                found = _keys(logits, highest, temperature) >> shift
                is_counted = ((found >> 4) == start) & (at < end)
                prob = tl.exp((logits - highest) / temperature)
                prob = tl.where(logits == highest, 1.0, prob)  # see _keys
                mass_of_token = (prob * 4398046511104.0).to(tl.int64)
                digit = tl.where(is_counted, (found & 15).to(tl.int32), -1)
                is_digit = digit == digits[None, :]
                counts += is_digit.to(tl.int32)
                masses += tl.where(is_digit, mass_of_token, 0)
    table_ptr = tables_ptr + ((step * rows + row) * splits + split) * 32
    tl.store(table_ptr + digits, tl.sum(counts, 0).to(tl.int64))
    tl.store(table_ptr + 16 + digits, tl.sum(masses, 0))


@triton.jit(
    do_not_specialize=["splits", "step"],
    do_not_specialize_on_alignment=["temperature_ptr"],
)
def find_token(
    logits_ptr,
    temperature_ptr,
    highest_ptr,
    tables_ptr,
    states_ptr,
    tokens_ptr,
    vocab,
    span,
    splits,
    step,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Finish the last search, whose last pass was `step` → tokens int64 [rows]; grid (rows,)."""
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    table_ptr = tables_ptr + (step * rows + row) * splits * 32
    state_ptr = states_ptr + (step * rows + row) * 4
    count, mass = tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    target = tl.load(state_ptr + 3)
    digit, _, mass, equals, equal_mass = _find_digit(
        table_ptr, splits, False, count, mass, target, SPLITS
    )
    key = (tl.load(state_ptr) * 16 + digit).to(tl.int32)
    # Equal tokens before the sampled one. Where the key's probabilities end, one may be 0.
    left = tl.minimum((target - mass) // tl.maximum(equal_mass // equals, 1), equals - 1)
    highest = _highest(highest_ptr, row, splits, SPLITS)
    temperature = tl.load(temperature_ptr + row)
    part = tl.arange(0, SPLITS)
    counts = tl.load(table_ptr + part * 32 + digit, part < splits, other=0)
    cumulative = tl.cumsum(counts, 0)
    split = tl.sum((cumulative <= left).to(tl.int32), 0)
    left -= tl.sum(tl.where(part < split, counts, 0), 0)
    start = split * span
    place = tl.arange(0, BLOCK)
    logits = _load_logits(logits_ptr + row * vocab, start + place, vocab)
    same = (_keys(logits, highest, temperature) == key).to(tl.int32)
    held = tl.sum(same, 0)
    while (held <= left) & (start + BLOCK < vocab):
        left -= held
        start += BLOCK
        logits = _load_logits(logits_ptr + row * vocab, start + place, vocab)
        same = (_keys(logits, highest, temperature) == key).to(tl.int32)
        held = tl.sum(same, 0)
    before = tl.sum((tl.cumsum(same, 0) <= left).to(tl.int32), 0)
    tl.store(tokens_ptr + row, tl.minimum(start + before, vocab - 1).to(tl.int64))
