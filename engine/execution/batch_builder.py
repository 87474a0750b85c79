"""Keeps the block tables of the running sequences and builds the ForwardBatch of each step.

Every running sequence has a row. Block tables are kept on the host, by row, and are written when
they change; a step selects its rows. All index arithmetic is on whole tensors: no Python code runs
per token.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.execution.sampler import to_device
from engine.parallel.step_message import StepMessage
from model.config import ModelConfig
from model.ops.forward_batch import ForwardBatch, GroupTables


class PreparedBatch(NamedTuple):
    """A step's batch, and the sampler's arguments for the sequences that sample a token."""

    batch: ForwardBatch
    rows: torch.Tensor  # int64 [sampling sequences], on the device
    positions: torch.Tensor  # int64 [sampling sequences]: index of the new token in its sequence


@dataclass(frozen=True)
class DecodeInputs:
    """Inputs of a step in which every sequence decodes one token; int64, on the host."""

    rows: torch.Tensor  # [sequences]
    context_lens: torch.Tensor  # [sequences]
    positions: torch.Tensor  # [sequences]: rows of the rotary table, as in ForwardBatch
    slot_mapping: list[torch.Tensor]  # [sequences] for each layer group


class BatchBuilder:
    """Builds the batches of steps, in which every sequence can have another length."""

    def __init__(
        self,
        groups: int,
        rows: int,
        max_positions: int,
        block_size: int,
        padding_block: int,
        device: torch.device,
        config: ModelConfig,
    ):
        """Allocate `rows` rows and a padding row, which refers to `padding_block` everywhere.

        groups: the number of layer groups, each with its own tables.
        """
        self.width = -(-max_positions // block_size)  # blocks of the longest sequence
        self.padding_row = rows
        self._block_size, self._device, self._rope = block_size, device, config.rope
        self._has_states = config.delta_rule is not None
        table = array("i", bytes(4 * rows * self.width)) + array("i", [padding_block]) * self.width
        # For each group int32 [rows + 1, width]: written as arrays, read as tensors.
        self._arrays = [table[:] for _ in range(groups)]
        self._tables = [
            torch.frombuffer(each, dtype=torch.int32).view(-1, self.width) for each in self._arrays
        ]

    def update_tables(self, message: StepMessage) -> None:
        """Write the block tables that have changed since the last step."""
        for row, tables in message.block_tables:
            first = row * self.width
            for flat, table in zip(self._arrays, tables, strict=True):
                flat[first : first + len(table)] = table

    def select_tables(self, rows: torch.Tensor, context_len: int) -> list[torch.Tensor]:
        """For each group the block tables int32 [rows, blocks] that hold `context_len` positions.

        rows: int64, on the host.
        """
        width = -(-context_len // self._block_size)
        return [table[:, :width].index_select(0, rows) for table in self._tables]

    def decode_inputs(self, rows: list[int], context_lens: list[int]) -> DecodeInputs:
        """The inputs of a step in which each of these rows computes its last position."""
        row_ids, lens = int64(rows), int64(context_lens)
        positions = lens - 1
        blocks, offsets = positions // self._block_size, positions % self._block_size
        slots = [table[row_ids, blocks] * self._block_size + offsets for table in self._tables]
        rope_rows = self._rope_rows(positions, context_lens)
        return DecodeInputs(row_ids, lens, rope_rows, slots)

    def _rope_rows(
        self, positions: torch.Tensor, lengths: list[int], owners: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The rows of the rotary table for positions of sequences of these lengths.

        owners: index of the sequence of each position; None: each sequence has one position.
        """
        if not self._rope.recompute_length:
            return positions
        first = int64(map(self._rope.first_row, lengths))
        return positions + (first if owners is None else first[owners])

    def build(self, message: StepMessage, last: torch.Tensor) -> PreparedBatch:
        """The batch of a step of decodes and chunks.

        last: int64 [rows], on the device: the token that each row sampled last.
        """
        decodes, size, device = message.decodes, message.size, self._device
        chunks = list(zip(message.starts, message.context_lens[decodes:], strict=True))
        query_lens = [1] * decodes + [end - start for start, end in chunks]
        singles = query_lens.count(1)  # sequences with a single token come first
        context_lens = list(message.context_lens)
        rows, ends = int64(message.rows), int64(context_lens)
        positions, owners = ends[:singles] - 1, torch.arange(size)
        query_ends = owners + 1
        if singles < size:
            ranges = [torch.arange(start, end) for start, end in chunks[singles - decodes :]]
            positions = torch.cat((positions, *ranges))
            query_ends = int64(query_lens).cumsum(0)
            # As owners.repeat_interleave, which divides even a few lengths among threads: on a
            # busy machine waiting for them takes longer than the step.
            owners = torch.zeros(len(positions), dtype=torch.int64)
            owners[query_ends[:-1]] = 1
            owners = owners.cumsum(0)
        blocks, offsets = positions // self._block_size, positions % self._block_size
        groups = []
        for table in self.select_tables(rows, max(context_lens)):
            slots = table[owners, blocks] * self._block_size + offsets
            groups.append(GroupTables(to_device(table, device), to_device(slots, device)))
        known_lengths = [*context_lens[:decodes], *message.lengths]
        logits_rows, sampling_rows, new_positions = query_ends - 1, rows, ends
        if not all(message.samples):
            kept = torch.tensor([1] * decodes + [*message.samples]).bool()
            logits_rows, sampling_rows = logits_rows[kept], sampling_rows[kept]
            new_positions = new_positions[kept]
        token_ids = last[to_device(rows[:decodes], device)]
        if chunks:
            token_ids = torch.cat((token_ids, to_device(int64(message.tokens), device)))
        batch = ForwardBatch(
            token_ids=token_ids,
            positions=to_device(self._rope_rows(positions, known_lengths, owners), device),
            host_query_lens=query_lens,
            host_context_lens=context_lens,
            num_single=singles,
            groups=tuple(groups),
            logits_rows=to_device(logits_rows, device),
            cu_seqlens_q=to_device(torch.nn.functional.pad(query_ends, (1, 0)).int(), device),
            context_lens=to_device(ends.int(), device),
            state_rows=to_device(rows, device) if self._has_states else None,
        )
        if not message.all_greedy:  # greedy sampling does not read the positions
            new_positions = to_device(new_positions, device)
        return PreparedBatch(batch, to_device(sampling_rows, device), new_positions)


def int64(values: Iterable[int]) -> torch.Tensor:
    """As torch.tensor(values, dtype=torch.int64), but eight times as fast."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)
