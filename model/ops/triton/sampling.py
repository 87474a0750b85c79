"""Launches of the kernels that adjust and sample the rows of a step."""

import torch
import triton

from model.ops.specs import AdjustmentTables, SamplingTables
from model.ops.triton.kernels.sampling.adjust import add_biases, apply_min_p, apply_penalties
from model.ops.triton.kernels.sampling.candidates import list_candidates
from model.ops.triton.kernels.sampling.choose import choose_tokens
from model.ops.triton.kernels.sampling.vocabulary_blocks import summarize_blocks
from model.ops.triton.tiles import Target

_BLOCK = 1024  # tokens whose probabilities are summed together: the result depends on it
_ENTRIES = 256  # biases that a row's program adds at a time
_CHUNK = 512  # tokens of a list, or of a row, that one program searches at a time
_PROGRAMS = 8  # of the row passes, on each processor: enough loads in flight to use the memory
# Tokens of all lists together; a row has at least _LEAST. Longer lists would rarely be of use.
_CAPACITY = 1 << 20
_LEAST = 4096


def adjust_logits(
    logits: torch.Tensor,
    rows: torch.Tensor,
    last: torch.Tensor,
    positions: torch.Tensor,
    tables: AdjustmentTables,
    target: Target,
) -> torch.Tensor:
    """As `Backend.adjust_logits`, for vocabularies of up to a million tokens."""
    logits, rows = logits.contiguous(), rows.contiguous()
    count, vocab = logits.shape
    if not count:
        return logits
    blocks, per_program = _division(count, vocab, target)
    grid = count, triton.cdiv(blocks, per_program)
    factors, starts, counts, entries, biases, masks = tables
    maxima = logits.new_empty(count, blocks)
    options = {"num_warps": 4, **target.launch_options}
    add_biases[(count,)](
        logits,
        rows,
        last,
        positions,
        starts,
        counts,
        entries,
        biases,
        vocab,
        biases.shape[1],
        CHUNK=_ENTRIES,
        **options,
    )
    sizes = vocab, blocks, per_program
    options["BLOCK"] = _BLOCK
    changes = factors, starts, counts, masks
    apply_penalties[grid](logits, rows, *changes, maxima, *sizes, **options)
    parts = triton.next_power_of_2(blocks)
    apply_min_p[grid](logits, rows, factors, maxima, *sizes, PARTS=parts, **options)
    return logits


def _division(rows: int, vocab: int, target: Target) -> tuple[int, int]:
    """Return the blocks of a row, and how many of them a program takes.

    Rows of small batches are split over the device.
    """
    blocks = triton.cdiv(vocab, _BLOCK)
    return blocks, triton.cdiv(blocks, triton.cdiv(_PROGRAMS * target.processors, rows))


def sample_rows(
    logits: torch.Tensor,
    rows: torch.Tensor,
    last: torch.Tensor,
    positions: torch.Tensor | None,
    tables: SamplingTables | None,
    target: Target,
) -> torch.Tensor:
    """As `Backend.sample_rows`, for vocabularies of up to a million tokens."""
    logits, rows = logits.contiguous(), rows.contiguous()
    count, vocab = logits.shape
    tokens = torch.empty_like(rows)
    if not count:
        return tokens
    blocks, per_program = _division(count, vocab, target)
    grid = count, triton.cdiv(blocks, per_program)
    maxima = logits.new_empty(count, blocks, dtype=torch.float32)
    parts = {"PARTS": triton.next_power_of_2(blocks)}
    options = {"BLOCK": _BLOCK, "num_warps": 4, **target.launch_options}
    greedy = positions is None or tables is None
    if positions is None or tables is None:  # these arguments are not read
        floats = sums = lists = maxima
        ints = states = positions = ids = tokens
        capacity = 0
    else:
        floats, ints = tables
        capacity = min(blocks * _BLOCK, max(_CAPACITY // count, _LEAST))
        sums, states = torch.empty_like(maxima), tokens.new_empty(count, 2)
        lists = logits.new_empty(count, capacity, dtype=torch.float32)
        ids = torch.empty_like(lists, dtype=torch.int32)
    summarize_blocks[grid](
        logits,
        rows,
        floats,
        maxima,
        sums,
        states,
        vocab,
        blocks,
        per_program,
        GREEDY=greedy,
        **options,
    )
    if not greedy:
        list_candidates[grid](
            logits,
            rows,
            floats,
            ints,
            maxima,
            sums,
            states,
            lists,
            ids,
            vocab,
            blocks,
            per_program,
            capacity,
            **parts,
            **options,
        )
    choose_tokens[(count,)](
        logits,
        rows,
        positions,
        floats,
        ints,
        maxima,
        sums,
        states,
        lists,
        ids,
        tokens,
        last,
        vocab,
        blocks,
        capacity,
        CHUNK=_CHUNK,
        GREEDY=greedy,
        **parts,
        **options,
    )
    return tokens
