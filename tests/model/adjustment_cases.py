"""Random changes of logits, and the same changes by a loop over tokens in Python."""

import math
import random

import torch

from model.ops.adjustments import NO_FACTORS
from model.ops.specs import AdjustmentTables


def random_tables(rows: int, vocab: int, seed: int = 0) -> AdjustmentTables:
    """Rows of all kinds, some of which change nothing."""
    source = random.Random(seed)
    tables = AdjustmentTables(
        torch.tensor(NO_FACTORS).repeat(rows, 1),
        torch.zeros(rows, 4, dtype=torch.int32),
        torch.zeros(rows, vocab, dtype=torch.int16),
        torch.zeros(rows, 600, 4, dtype=torch.int32),
        torch.zeros(rows, 600),
        torch.full((rows, -(-vocab // 32)), 0x5A0F83C1, dtype=torch.int32),
    )
    tables.masks[:, -1] = -(2**31) + 5
    for row in range(rows):
        if row % 3 == 1:
            penalties = source.uniform(0.5, 2), source.uniform(-2, 2), source.uniform(-2, 2)
            tables.factors[row, :3] = torch.tensor(penalties)
            tables.starts[row] = torch.tensor([9 + row % 2, 0, 1, 0])
            seen = source.sample(range(vocab), vocab // 2)
            values = [source.choice([1, 2, 3, 8, 2**15 - 1]) for _ in seen]
            tables.counts[row, seen] = torch.tensor(values, dtype=torch.int16)
        tables.starts[row, 3] = row % 5 in (1, 4)
        if row % 4 == 2:
            tables.factors[row, 3] = source.uniform(-2, 0)
        for i in range(source.choice([0, 3, 600])):
            first = source.choice([0, 10, 11])
            before = source.choice([-1, -1, row % vocab, 1])
            entry = source.randrange(vocab), first, source.choice([10, 11, 99]), before
            tables.entries[row, i] = torch.tensor(entry)
            tables.biases[row, i] = -math.inf if i % 5 else 0.5
            tables.starts[row, 1] = i + 1
    return tables


def adjusted(
    logits: torch.Tensor,
    rows: list[int],
    last: list[int],
    positions: list[int],
    tables: AdjustmentTables,
) -> torch.Tensor:
    """What `Backend.adjust_logits` returns, computed token by token; also changes the counts."""
    found = logits.tolist()
    for own, row, position in zip(found, rows, positions, strict=True):
        previous = last[row]
        start, entries, has_penalties, has_mask = tables.starts[row].tolist()
        for i in range(entries):
            token, first, end, before = tables.entries[row, i].tolist()
            if first <= position < end and before in (-1, previous):
                own[token] += float(tables.biases[row, i])
        for token in range(len(own) if has_mask else 0):
            if not int(tables.masks[row, token // 32]) >> token % 32 & 1:
                own[token] = -math.inf
        repetition, frequency, presence, distance = tables.factors[row].tolist()
        if has_penalties:
            if position > start and tables.counts[row, previous] < 2**15 - 2:
                tables.counts[row, previous] += 2
            for token, count in enumerate(tables.counts[row].tolist()):
                if count:
                    own[token] *= repetition if own[token] <= 0 else 1 / repetition
                own[token] -= frequency * (count // 2) + presence * (count > 1)
        least = max(own) + distance
        own[:] = [value if value >= least else -math.inf for value in own]
    return torch.tensor(found)
