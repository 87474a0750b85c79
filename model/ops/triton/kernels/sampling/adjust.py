"""Changes of the logits of a step's rows, in place: biases, mask, penalties, min-p.

Three kernels, because each needs what all programs of a row have written before. A row without
changes of a kind is left as it is.
"""

import triton
import triton.language as tl

from model.ops.triton.kernels.sampling.vocabulary_blocks import load_logits, load_maxima
from model.ops.triton.programmatic_launch import wait_for_previous_kernel

_MAX_COUNT = tl.constexpr(32766)  # an element of the counts, an int16, never exceeds it by more


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "positions_ptr"])
def add_biases(
    logits_ptr,
    rows_ptr,
    last_ptr,
    positions_ptr,
    starts_ptr,
    counts_ptr,
    entries_ptr,
    biases_ptr,
    vocab,
    capacity,
    CHUNK: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Count each row's last token, and add the biases that apply at its position; grid (n,).

    Several entries may concern one token, so additions are atomic; their order has no effect, as
    all but one are -inf.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row = tl.program_id(0).to(tl.int64)
    index = tl.load(rows_ptr + row)
    previous = tl.load(last_ptr + index)
    position = tl.load(positions_ptr + row).to(tl.int32)
    start = tl.load(starts_ptr + index * 4)
    entries = tl.load(starts_ptr + index * 4 + 1)
    if (tl.load(starts_ptr + index * 4 + 2) > 0) & (position > start):
        at = counts_ptr + index * vocab + previous
        old = tl.load(at).to(tl.int32)
        tl.store(at, tl.where(old < _MAX_COUNT, old + 2, old).to(tl.int16))
    for first_entry in range(0, entries, CHUNK):
        entry = first_entry + tl.arange(0, CHUNK)
        valid = entry < entries
        at = index * capacity + entry
        token = tl.load(entries_ptr + at * 4, valid, other=0)
        first = tl.load(entries_ptr + at * 4 + 1, valid, other=0)
        end = tl.load(entries_ptr + at * 4 + 2, valid, other=0)
        before = tl.load(entries_ptr + at * 4 + 3, valid, other=0)
        applies = valid & (first <= position) & (position < end)
        applies = applies & ((before < 0) | (before == previous))
        bias = tl.load(biases_ptr + at, applies, other=0.0)
        tl.atomic_add(logits_ptr + row * vocab + token, bias, applies)


@triton.jit(
    do_not_specialize=["blocks_of_program"],
    do_not_specialize_on_alignment=["rows_ptr"],
)
def apply_penalties(
    logits_ptr,
    rows_ptr,
    factors_ptr,
    starts_ptr,
    counts_ptr,
    masks_ptr,
    maxima_ptr,
    vocab,
    blocks,
    blocks_of_program,
    BLOCK: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Apply the mask and the penalties; grid (n, programs of a row).

    Writes the maximum of each block of rows with min-p to maxima float32 [n, blocks].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = tl.load(rows_ptr + row)
    has_penalties = tl.load(starts_ptr + index * 4 + 2) > 0
    has_mask = tl.load(starts_ptr + index * 4 + 3) > 0
    words = tl.cdiv(vocab, 32)
    repetition = tl.load(factors_ptr + index * 4)
    frequency = tl.load(factors_ptr + index * 4 + 1)
    presence = tl.load(factors_ptr + index * 4 + 2)
    has_min_p = tl.load(factors_ptr + index * 4 + 3) > -float("inf")
    if has_penalties | has_min_p | has_mask:
        first = program * blocks_of_program
        for block in range(first, tl.minimum(first + blocks_of_program, blocks)):
            at = block * BLOCK + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + row * vocab + at, at < vocab, other=-float("inf"))
            if has_mask:
                word = tl.load(masks_ptr + index * words + at // 32, at < vocab, other=0)
                logits = tl.where(((word >> (at % 32)) & 1) != 0, logits, -float("inf"))
            if has_penalties:
                counts = tl.load(counts_ptr + index * vocab + at, at < vocab, other=0).to(tl.int32)
                repeated = tl.where(logits > 0, logits / repetition, logits * repetition)
                logits = tl.where(counts > 0, repeated, logits)
                outputs = counts >> 1
                logits -= frequency * outputs.to(tl.float32)
                logits -= tl.where(outputs > 0, presence, 0.0)
            if has_penalties | has_mask:
                tl.store(logits_ptr + row * vocab + at, logits, at < vocab)
            if has_min_p:
                comparable = tl.where(logits == logits, logits, float("inf"))
                tl.store(maxima_ptr + row * blocks + block, tl.max(comparable, 0))


@triton.jit(
    do_not_specialize=["blocks_of_program"],
    do_not_specialize_on_alignment=["rows_ptr"],
)
def apply_min_p(
    logits_ptr,
    rows_ptr,
    factors_ptr,
    maxima_ptr,
    vocab,
    blocks,
    blocks_of_program,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Set logits too far below the row's largest one to -inf; grid (n, programs of a row)."""
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    distance = tl.load(factors_ptr + tl.load(rows_ptr + row) * 4 + 3)
    if distance > -float("inf"):
        least = tl.max(load_maxima(maxima_ptr, row, blocks, PARTS), 0) + distance
        first = program * blocks_of_program
        for block in range(first, tl.minimum(first + blocks_of_program, blocks)):
            at = block * BLOCK + tl.arange(0, BLOCK)
            logits = load_logits(logits_ptr + row * vocab, at, vocab)
            is_removed = (at < vocab) & (logits < least)
            removed = tl.full((BLOCK,), -float("inf"), tl.float32)
            tl.store(logits_ptr + row * vocab + at, removed, is_removed)
