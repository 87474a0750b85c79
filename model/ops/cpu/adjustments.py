"""Changes of logits on a CPU: only of the tokens that a row's changes concern."""

import math

import torch

from model.ops.adjustments import MAX_COUNT, penalized
from model.ops.specs import AdjustmentTables


def adjust_logits(
    logits: torch.Tensor,
    rows: torch.Tensor,
    last: torch.Tensor,
    positions: torch.Tensor,
    tables: AdjustmentTables,
) -> torch.Tensor:
    """As `Backend.adjust_logits`; rows without changes are not touched."""
    steps = zip(rows.tolist(), last[rows].tolist(), positions.tolist(), strict=True)
    factors, starts = tables.factors[rows].tolist(), tables.starts[rows].tolist()
    for own, (row, previous, position), (*penalties, distance), (
        start,
        entries,
        has_penalties,
        has_mask,
    ) in zip(logits, steps, factors, starts, strict=True):
        if entries:
            _add_biases(own, tables.entries[row, :entries], tables.biases[row], position, previous)
        if has_mask:
            own.masked_fill_(_forbidden(tables.masks[row], len(own)), -math.inf)
        if has_penalties:
            counts = tables.counts[row]
            if position > start and (old := int(counts[previous])) < MAX_COUNT - 1:
                counts[previous] = old + 2
            at = counts.nonzero().squeeze(1)
            own[at] = penalized(own[at], counts[at], *penalties)
        if math.isfinite(distance):
            own.masked_fill_(own < own.max() + distance, -math.inf)
    return logits


_FORBIDDEN = torch.tensor([[not byte >> bit & 1 for bit in range(8)] for byte in range(256)])


def _forbidden(mask: torch.Tensor, vocab: int) -> torch.Tensor:
    """Return bool [vocab], True where the bit of mask int32 [words] is 0."""
    return _FORBIDDEN.index_select(0, mask.view(torch.uint8).int()).view(-1)[:vocab]


def _add_biases(
    logits: torch.Tensor,
    entries: torch.Tensor,
    biases: torch.Tensor,
    position: int,
    previous: int,
) -> None:
    token, first, end, before = entries.unbind(1)
    applies = (first <= position) & (position < end) & ((before < 0) | (before == previous))
    at = applies.nonzero().squeeze(1)
    logits.index_add_(0, token[at], biases[at])
