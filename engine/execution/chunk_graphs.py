"""Captured steps with chunks, for padded numbers of tokens: one launch instead of hundreds.

A GPU computes a step of a few hundred tokens faster than the host launches its kernels. Larger
steps, which are not captured, take the GPU longer.

Single tokens come first and are padded to one of a few numbers; the tokens of chunks follow from
there and are padded to another. Every padding token belongs to a sequence that reads and writes
only a reserved block, so that no result is undefined. What else differs between steps, such as the
number of chunks and their lengths, is read from tensors.
"""

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial
from itertools import accumulate

import torch

from engine.execution.capture import Record
from engine.execution.sampler import to_device
from model.ops.backend import Compute
from model.ops.forward_batch import ForwardBatch, GroupTables

Forward = Callable[[ForwardBatch, torch.Tensor], torch.Tensor]
"""(Batch, a buffer for the logits) → logits."""

MAX_CHUNK_TOKENS = 1024  # the GPU takes longer than the host for more, even of a small model
_CHUNK_TOKENS = (64, 128, 256, 384, 512, 768, MAX_CHUNK_TOKENS)
_CHUNKS = 64


def chunk_token_sizes(largest: int) -> list[int]:
    """Numbers of chunk tokens to capture, up to `largest` or the largest that pays."""
    largest = min(largest, _CHUNK_TOKENS[-1])
    return [*(size for size in _CHUNK_TOKENS if size < largest), *[largest][:largest]]


def single_token_sizes(largest: int) -> list[int]:
    """Numbers of single tokens to capture: 16, 64, 256 … `largest`.

    A step has few tokens where padding is large, so that reading the weights takes longer.
    """
    sizes = [16]
    while sizes[-1] < largest:
        sizes.append(min(4 * sizes[-1], largest))
    return [min(size, largest) for size in sizes]


class ChunkGraphs:
    """A captured step for each pair of sizes: single tokens, and tokens of chunks."""

    def __init__(
        self,
        forward: Forward,
        widths: SequenceOf[int],
        padding_block: int,
        block_size: int,
        sizes: tuple[int, int],
        logits: torch.Tensor,
        record: Record,
    ):
        """Capture steps of up to `sizes` single tokens and tokens of chunks.

        widths: for each layer group, the blocks of the longest sequence. logits [rows, vocab]: a
        buffer for the results, with a row for every sequence that may be sampled. The row after
        those of single tokens is for padding.
        """
        self._tokens = chunk_token_sizes(sizes[1])
        self._singles = single_token_sizes(sizes[0])
        self._inputs = [
            _Inputs(
                singles,
                max(self._tokens, default=0),
                widths,
                (padding_block, sizes[0]),
                block_size,
                logits,
            )
            for singles in self._singles
        ]
        self._replay: dict[tuple[int, int], Compute] = {}
        for number, inputs in reversed(list(enumerate(self._inputs))):  # largest first
            for tokens in reversed(self._tokens):
                inputs.fill_padding(tokens)
                compute = partial(self._compute, forward, inputs, tokens)
                self._replay[number, tokens] = record(compute)

    @staticmethod
    def _compute(forward: Forward, inputs: "_Inputs", tokens: int) -> torch.Tensor:
        return forward(inputs.batch(tokens), inputs.logits)

    def __call__(self, batch: ForwardBatch) -> torch.Tensor | None:
        """The logits of a batch with chunks, valid until the next step; None if it is too large."""
        singles = batch.num_single
        number = bisect_left(self._singles, singles)
        size = bisect_left(self._tokens, len(batch.token_ids) - singles)
        chunks = len(batch.host_query_lens) - singles
        if number == len(self._singles) or size == len(self._tokens) or chunks > _CHUNKS:
            return None
        inputs, tokens = self._inputs[number], self._tokens[size]
        if len(batch.logits_rows) > len(inputs.logits):
            return None
        inputs.fill(batch, tokens)
        return self._replay[number, tokens]()[: len(batch.logits_rows)]


class _Inputs:
    """The buffers that captured steps with one number of single tokens read.

    Sequences: `singles` of one token each, `_CHUNKS` chunks, and one of all padding after them.
    """

    def __init__(
        self,
        singles: int,
        tokens: int,
        widths: SequenceOf[int],
        padding: tuple[int, int],
        block_size: int,
        logits: torch.Tensor,
    ):
        """padding: the block and the row that padding may write to."""
        padding_block, self._padding_row = padding
        device, sequences = logits.device, singles + _CHUNKS + 1
        self._singles, self._device, self._padding_block = singles, device, padding_block
        self.logits = logits[: singles + _CHUNKS]
        new = partial(torch.zeros, dtype=torch.int64, device=device)
        self._ids, self._positions = new(singles + tokens), new(singles + tokens)
        self._logits_rows = new(len(self.logits))
        self._lengths = new(sequences, dtype=torch.int32)
        self._starts = new(sequences + 1, dtype=torch.int32)
        self._rows = torch.full((sequences,), self._padding_row, device=device)
        # Padding writes to all slots of its block that it reads.
        offsets = torch.arange(singles + tokens, device=device) % block_size
        self._padding_slots = padding_block * block_size + offsets
        self._groups = [
            GroupTables(
                torch.full((sequences, width), padding_block, dtype=torch.int32, device=device),
                self._padding_slots.clone(),
            )
            for width in widths
        ]

    def batch(self, tokens: int) -> ForwardBatch:
        """The batch with this number of chunk tokens; lengths are only in its tensors."""
        total = self._singles + tokens
        return ForwardBatch(
            token_ids=self._ids[:total],
            positions=self._positions[:total],
            host_query_lens=[1] * len(self._lengths),
            host_context_lens=[],
            num_single=self._singles,
            groups=tuple(
                GroupTables(group.block_table, group.slot_mapping[:total]) for group in self._groups
            ),
            logits_rows=self._logits_rows,
            cu_seqlens_q=self._starts,
            context_lens=self._lengths,
            state_rows=self._rows,
        )

    def fill_padding(self, tokens: int) -> None:
        """Set a batch that consists of padding."""
        self._set_lengths([], [], 0, tokens)

    def fill(self, batch: ForwardBatch, tokens: int) -> None:
        """Set the buffers to a batch that is padded to this number of chunk tokens."""
        count, singles = batch.num_single, self._singles
        given = len(batch.token_ids) - count
        self._set_lengths(batch.host_query_lens, batch.host_context_lens, count, tokens)
        first, second = slice(0, count), slice(singles, singles + given)
        for own, values in ((self._ids, batch.token_ids), (self._positions, batch.positions)):
            own[first].copy_(values[:count])
            own[second].copy_(values[count:])
        for group, of in zip(self._groups, batch.groups, strict=True):
            slots, padding = group.slot_mapping, self._padding_slots
            slots[first].copy_(of.slot_mapping[:count])
            slots[count:singles] = padding[0]  # the only slot that a single token reads
            slots[second].copy_(of.slot_mapping[count:])
            rest = tokens - given
            slots[singles + given : singles + tokens].copy_(padding[:rest])
            table, width = group.block_table, of.block_table.shape[1]
            table[first, :width].copy_(of.block_table[:count])
            table[count:singles, :1] = self._padding_block
            chunks = len(of.block_table) - count
            table[singles : singles + chunks, :width].copy_(of.block_table[count:])
        if batch.state_rows is not None:
            chunks = len(batch.state_rows) - count
            self._rows[first].copy_(batch.state_rows[:count])
            self._rows[count:singles] = self._padding_row
            self._rows[singles : singles + chunks].copy_(batch.state_rows[count:])
            self._rows[singles + chunks :] = self._padding_row
        rows = batch.logits_rows
        self._logits_rows[: len(rows)].copy_(rows + (rows >= count) * (singles - count))
        self._logits_rows[len(rows) :] = 0

    def _set_lengths(
        self, query_lens: list[int], context_lens: list[int], count: int, tokens: int
    ) -> None:
        """Set the lengths of all sequences, of which the first `count` have a single token."""
        chunks, singles = query_lens[count:], self._singles
        unused, padding = [0] * (_CHUNKS - len(chunks)), tokens - sum(chunks)
        lengths = [*context_lens[:count], *[1] * (singles - count), *context_lens[count:]]
        starts = accumulate([*[1] * singles, *chunks, *unused, padding], initial=0)
        for own, values in ((self._lengths, [*lengths, *unused, padding]), (self._starts, starts)):
            own.copy_(to_device(torch.tensor([*values], dtype=torch.int32), self._device))
