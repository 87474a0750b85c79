"""Top-k, top-p and the draw without a sort: each is a search for a place in an order.

In the order of probability the last token that top-k keeps is the one at which the running count
passes k; the last that top-p keeps is where the running probability passes a share of what top-k
kept; and the drawn one is where it passes a uniform part of what both kept. So there are three
searches of one kind, each of which hands a single number to the next.

A search narrows down the tokens' keys, integers that rise as logits fall, by four bits a pass: a
pass tallies tokens and probability by the next digit of the key, and from the sums over its row
each program of the next pass works out by itself which digit it is. Keys of bf16 have four digits,
and the tally of the first is the same in all searches: 3 · 3 + 1 passes.

Probabilities are integers, in 2⁻⁴² of the likeliest token's; what is less counts as nothing. Their
sums are the same in any order, so that a row may be split over as many programs as fill the device
and still be drawn from as it is alone, and no rounding makes two passes differ. Counts tell equal
logits apart, of which the lower token comes first.

One program a row would leave most of the device idle at small batches, and one kernel for all
passes would need programs that wait for each other, which is not portable. Between passes a row
is in the L2 cache where the batch is small; after the first, blocks without a token that is still
in question are only read.
"""

import torch
import triton
import triton.language as tl

from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.tiles import Target

_BLOCK = 2048  # tokens that a program looks at together
_PART = 256  # tokens that a program tallies together
_SPLITS = 64  # programs of a row at most; each reads what all of them tallied
_BITS = 4  # of a key by which a pass narrows down: 16 counters fit a thread's registers
_TOP_K, _TOP_P, _DRAW = range(1, 4)  # what a search is for


@triton.jit
def _load(logits_ptr, at, end):
    """Logits at places before the end, the others -inf; NaN is -inf and -0 is 0."""
    logits = tl.load(logits_ptr + at, at < end, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits == logits, logits, float("-inf"))
    return tl.where(logits == 0, 0.0, logits).to(logits_ptr.dtype.element_ty)


@triton.jit
def _keys(logits, WIDTH: tl.constexpr):
    """uint32 that rise as the logits fall: bits of the positive are turned, of the negative not."""
    if WIDTH == 16:
        bits = logits.to(tl.int16, bitcast=True).to(tl.int32)
        keys = (tl.where(bits < 0, bits, bits ^ 0x7FFF) & 0xFFFF).to(tl.uint32)
    else:
        bits = logits.to(tl.int32, bitcast=True)
        keys = tl.where(bits < 0, bits, bits ^ 0x7FFFFFFF).to(tl.uint32, bitcast=True)
    return keys


@triton.jit(do_not_specialize=["splits"])
def _highest(
    logits_ptr,
    highest_ptr,
    vocab,
    span,
    splits,
    BLOCK: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """logits [rows, vocab] → highest float32 [rows, splits], of each span of a row."""
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.minimum((split + 1) * span, vocab)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(split * span, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        highest = tl.maximum(highest, _load(logits_ptr + row * vocab, at, end).to(tl.float32))
    tl.store(highest_ptr + row * splits + split, tl.max(highest, 0))


@triton.jit
def _settle(table_ptr, splits, by_count, count, mass, target, SPLITS: tl.constexpr):
    """The digit at which the running count, or mass, passes the target.

    table int64 [splits, 2, 16]: tokens and mass of each digit; count, mass: what comes before the
    first → (digit, count and mass of what comes before it, its own count and mass).
    """
    split, digit = tl.arange(0, SPLITS), tl.arange(0, 16)
    source = table_ptr + split[:, None] * 32 + digit[None, :]
    inside = (split < splits)[:, None]
    counts = tl.sum(tl.load(source, inside, other=0), 0)
    masses = tl.sum(tl.load(source + 16, inside, other=0), 0)
    upto = tl.where(by_count, count, mass) + tl.cumsum(tl.where(by_count, counts, masses), 0)
    found = tl.sum((upto <= target).to(tl.int32), 0)
    count += tl.sum(tl.where(digit < found, counts, 0), 0)
    mass += tl.sum(tl.where(digit < found, masses, 0), 0)
    own = digit == found
    own_count, own_mass = tl.sum(tl.where(own, counts, 0), 0), tl.sum(tl.where(own, masses, 0), 0)
    return found, count, mass, own_count, own_mass


@triton.jit
def _target(
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
    """What a search must pass, from the table and the state of the last pass before it.

    That pass ended the search before, or was the first tally: as if top-k had kept all.
    """
    if goal == TOP_K:
        top_k = tl.load(top_k_ptr + row)
        target = tl.where((top_k <= 0) | (top_k > vocab), vocab, top_k) - 1
    else:
        by_count = goal == TOP_P
        count, mass = tl.load(state_ptr + 1), tl.load(state_ptr + 2)
        last = tl.load(state_ptr + 3)
        _, count, mass, equals, whole = _settle(
            table_ptr, splits, by_count, count, mass, last, SPLITS
        )
        each = whole // equals
        # Of the tokens equal to the last one that is kept, so many are.
        these = tl.where(by_count, last - count, (last - mass) // tl.maximum(each, 1)) + 1
        kept = mass + tl.where(these == equals, whole, these * each)
        if by_count:
            share = tl.load(top_p_ptr + row).to(tl.float64)
            target = tl.ceil(share * kept.to(tl.float64)).to(tl.int64) - 1
        else:
            target = (tl.load(uniform_ptr + row) * kept.to(tl.float64)).to(tl.int64)
        target = tl.minimum(tl.maximum(target, 0), kept - 1)
    return target


@triton.jit(
    do_not_specialize=["splits", "step", "goal", "by_count", "shift"],
    # A column of one row's parameters begins where its row does not.
    do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "uniform_ptr"],
)
def _tally(
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
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """One pass: tokens and mass by the digit at `shift`, of keys that begin as the search found.

    tables int64 [steps, rows, splits, 2, 16]; states int64 [steps, rows, 4]: what keys begin with,
    count and mass of the tokens before those, and the target, which is a count if by_count. goal:
    of the search that begins with this step, or 0; grid (rows, splits).
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
            target = _target(
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
        digit, count, mass, _, _ = _settle(
            table_ptr, splits, by_count != 0, count, mass, target, SPLITS
        )
        prefix = prefix * 16 + digit
    if split == 0:
        state_ptr = states_ptr + (step * rows + row) * 4
        tl.store(state_ptr, prefix)
        tl.store(state_ptr + 1, count)
        tl.store(state_ptr + 2, mass)
        tl.store(state_ptr + 3, target)

    part = tl.arange(0, SPLITS)
    tops = tl.load(highest_ptr + row * splits + part, part < splits, other=float("-inf"))
    highest = tl.max(tops, 0)
    temperature = tl.load(temperature_ptr + row)
    start = prefix.to(tl.uint32)
    digits = tl.arange(0, 16)
    counts = tl.zeros((PART, 16), tl.int32)
    masses = tl.zeros((PART, 16), tl.int64)
    end = tl.minimum((split + 1) * span, vocab)
    for first in range(split * span, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        keys = _keys(_load(logits_ptr + row * vocab, place, end), WIDTH)
        begun = ((keys >> shift >> 4) == start) & (place < end)
        if tl.max(begun.to(tl.int32), 0) > 0:
            for offset in range(0, BLOCK, PART):
                # Each thread counts its own tokens: sums over threads are made once, at the end.
                at = first + offset + tl.arange(0, PART)[:, None]
                logits = _load(logits_ptr + row * vocab, at, end)
                found = _keys(logits, WIDTH) >> shift
                asked = ((found >> 4) == start) & (at < end)
                wide = logits.to(tl.float32)
                # Equal ones apart: infinity less infinity is no number.
                share = tl.where(wide == highest, 1.0, tl.exp((wide - highest) / temperature))
                own = (share * 4398046511104.0).to(tl.int64)
                digit = tl.where(asked, (found & 15).to(tl.int32), -1)
                here = digit == digits[None, :]
                counts += here.to(tl.int32)
                masses += tl.where(here, own, 0)
    table_ptr = tables_ptr + ((step * rows + row) * splits + split) * 32
    tl.store(table_ptr + digits, tl.sum(counts, 0).to(tl.int64))
    tl.store(table_ptr + 16 + digits, tl.sum(masses, 0))


@triton.jit(do_not_specialize=["splits", "step"])
def _find(
    logits_ptr,
    tables_ptr,
    states_ptr,
    tokens_ptr,
    vocab,
    span,
    splits,
    step,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """End the draw's search, whose last pass was `step` → tokens int64 [rows]; grid (rows,)."""
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    table_ptr = tables_ptr + (step * rows + row) * splits * 32
    state_ptr = states_ptr + (step * rows + row) * 4
    count, mass = tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    target = tl.load(state_ptr + 3)
    digit, _, mass, equals, whole = _settle(table_ptr, splits, False, count, mass, target, SPLITS)
    key = (tl.load(state_ptr) * 16 + digit).to(tl.uint32)
    left = (target - mass) // (whole // equals)  # equal tokens before the one drawn
    part = tl.arange(0, SPLITS)
    counts = tl.load(table_ptr + part * 32 + digit, part < splits, other=0)
    upto = tl.cumsum(counts, 0)
    split = tl.sum((upto <= left).to(tl.int32), 0)
    left -= tl.sum(tl.where(part < split, counts, 0), 0)
    start = split * span
    place = tl.arange(0, BLOCK)
    same = (_keys(_load(logits_ptr + row * vocab, start + place, vocab), WIDTH) == key).to(tl.int32)
    held = tl.sum(same, 0)
    while (held <= left) & (start + BLOCK < vocab):
        left -= held
        start += BLOCK
        logits = _load(logits_ptr + row * vocab, start + place, vocab)
        same = (_keys(logits, WIDTH) == key).to(tl.int32)
        held = tl.sum(same, 0)
    before = tl.sum((tl.cumsum(same, 0) <= left).to(tl.int32), 0)
    tl.store(tokens_ptr + row, tl.minimum(start + before, vocab - 1).to(tl.int64))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
    target: Target,
) -> torch.Tensor:
    """As `Backend.sample`, for vocabularies of up to a million tokens."""
    logits, temperature, top_p = logits.contiguous(), temperature.contiguous(), top_p.contiguous()
    top_k = None if top_k is None else top_k.contiguous()
    uniform = uniform.contiguous()
    rows, vocab = logits.shape
    tokens = logits.new_empty(rows, dtype=torch.int64)
    if not rows:
        return tokens
    # Small batches are split over the device; more programs than fill it only read more tables.
    splits = min(_SPLITS, triton.cdiv(4 * target.processors, rows))
    span = triton.cdiv(triton.cdiv(vocab, splits), _BLOCK) * _BLOCK
    splits = triton.cdiv(vocab, span)
    width = 8 * logits.element_size()
    passes = width // _BITS
    goals = (_TOP_P, _DRAW) if top_k is None else (_TOP_K, _TOP_P, _DRAW)
    steps = [(0, False, width - _BITS)]
    for goal in goals:
        for i in range(1, passes):
            steps.append((goal if i == 1 else 0, goal == _TOP_K, width - _BITS * (i + 1)))
    highest = logits.new_empty(rows, splits, dtype=torch.float32)
    tables = logits.new_empty(len(steps), rows, splits, 2, 16, dtype=torch.int64)
    states = logits.new_empty(len(steps), rows, 4, dtype=torch.int64)
    options = {"BLOCK": _BLOCK, "num_warps": 4, **target.launch_options}
    _highest[rows, splits](logits, highest, vocab, span, splits, **options)
    for step, (goal, by_count, shift) in enumerate(steps):
        _tally[rows, splits](
            logits,
            temperature,
            tokens if top_k is None else top_k,
            top_p,
            uniform,
            highest,
            tables,
            states,
            vocab,
            span,
            splits,
            step,
            goal,
            int(by_count),
            shift,
            PART=_PART,
            SPLITS=_SPLITS,
            WIDTH=width,
            TOP_K=_TOP_K,
            TOP_P=_TOP_P,
            **options,
        )
    _find[(rows,)](
        logits,
        tables,
        states,
        tokens,
        vocab,
        span,
        splits,
        len(steps) - 1,
        SPLITS=_SPLITS,
        WIDTH=width,
        **options,
    )
    return tokens
