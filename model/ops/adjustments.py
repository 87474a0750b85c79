"""Changes of logits by what a request asks for, in plain torch: biases, penalties, min-p.

The penalties are those of OpenAI's documentation ("Frequency and presence penalties") and of
Keskar et al. 2019 ("CTRL", section 4.1: the repetition penalty); the order is vLLM's.
"""

import torch

from model.ops.specs import AdjustmentTables

MAX_COUNT = 2**15 - 1  # of an element of the counts
NO_FACTORS = (1.0, 0.0, 0.0, float("-inf"))  # of a row whose logits stay as they are


def adjust_logits(
    logits: torch.Tensor,
    rows: torch.Tensor,
    last: torch.Tensor,
    positions: torch.Tensor,
    tables: AdjustmentTables,
) -> torch.Tensor:
    """As `Backend.adjust_logits`, without reading a value on the host."""
    factors, previous, positions = tables.factors[rows], last[rows], positions.int()
    start, entries, has_penalties, has_mask = tables.starts[rows].unbind(1)
    counts = tables.counts
    old = counts[rows, previous]
    grows = (positions > start) & (has_penalties > 0) & (old < MAX_COUNT - 1)
    counts.index_put_((rows, previous), old + 2 * grows.to(old.dtype))
    token, first, end, before = tables.entries[rows].unbind(2)
    applies = torch.arange(token.shape[1], device=logits.device) < entries[:, None]
    applies &= (positions[:, None] >= first) & (positions[:, None] < end)
    applies &= (before < 0) | (before == previous[:, None])
    logits.scatter_add_(1, token.long(), torch.where(applies, tables.biases[rows], 0.0))
    masks = torch.where(has_mask[:, None] > 0, tables.masks[rows], -1)
    logits.masked_fill_(forbidden(masks, logits.shape[1]), float("-inf"))
    repetition, frequency, presence, distance = factors.unsqueeze(2).unbind(1)
    found = counts[rows] * has_penalties[:, None]
    logits.copy_(penalized(logits, found, repetition, frequency, presence))
    highest = logits.amax(1, keepdim=True)
    return logits.masked_fill_(logits < highest + distance, float("-inf"))


def forbidden(masks: torch.Tensor, vocab: int) -> torch.Tensor:
    """Return bool [rows, vocab], True where the bit of masks int32 [rows, words] is 0."""
    bits = torch.arange(8, dtype=torch.uint8, device=masks.device)
    found = masks.contiguous().view(torch.uint8).unsqueeze(-1) >> bits & 1
    return found.view(len(masks), -1)[:, :vocab] == 0


def penalized(
    logits: torch.Tensor,
    counts: torch.Tensor,
    repetition: torch.Tensor | float,
    frequency: torch.Tensor | float,
    presence: torch.Tensor | float,
) -> torch.Tensor:
    """Return logits after the penalties; counts: of the same shape, see `AdjustmentTables`."""
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(counts > 0, repeated, logits)
    outputs = counts >> 1
    return logits - frequency * outputs - presence * (outputs > 0)
