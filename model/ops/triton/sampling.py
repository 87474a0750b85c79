"""Launches of the kernels that sample the rows of a step."""

import torch
import triton

from model.ops.specs import SamplingTables
from model.ops.triton.kernels.candidates import list_candidates
from model.ops.triton.kernels.sampling import choose_tokens
from model.ops.triton.kernels.vocabulary_blocks import summarize_blocks
from model.ops.triton.tiles import Target

_BLOCK = 1024  # tokens whose probabilities are summed together: the result depends on it
_CHUNK = 512  # tokens of a list, or of a row, that one program searches at a time
_PROGRAMS = 8  # of the row passes, on each processor: enough loads in flight to use the memory
# Tokens of all lists together; a row has at least _LEAST. Longer lists would rarely be of use.
_CAPACITY = 1 << 20
_LEAST = 4096


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
    blocks = triton.cdiv(vocab, _BLOCK)
    # Rows of small batches are split over the device.
    per_program = triton.cdiv(blocks, triton.cdiv(_PROGRAMS * target.processors, count))
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
