"""Decode steps of fixed sizes, captured once and replayed: one launch instead of hundreds.

On a GPU a captured step is a CUDA or HIP graph, on a CPU a recorded list of kernel calls.

A captured step reads its inputs from fixed buffers, and the last tokens from the sampler's tensor.
A batch is padded to the next captured size; padding rows write to a reserved block, and their
logits are ignored.
"""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch

from engine.execution.batch_builder import DecodeInputs
from engine.execution.capture import Record
from model.ops.backend import Compute
from model.ops.forward_batch import ForwardBatch, GroupTables


def capture_sizes(largest: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, 16, … 128, 144, … `largest`.

    In steps of 8, and above 128 eight sizes for each doubling: padding adds at most an eighth to
    large batches, and each size is run and captured before a job starts.
    """
    starts = [8 << i for i in range((largest // 8).bit_length())]
    steps = (range(start, 2 * start, max(8, start // 8)) for start in starts)
    return _up_to(largest, 1, 2, 4, *itertools.chain.from_iterable(steps))


def _up_to(largest: int, *sizes: int) -> list[int]:
    return sorted({size for size in sizes if size < largest} | {largest})


@dataclass(frozen=True)
class GraphInputs:
    """The inputs of a captured step besides block tables: views of one buffer, copied at once.

    Each tensor begins at a multiple of 16 bytes, for any size: kernels are compiled for that.
    """

    buffer: torch.Tensor  # uint8: all of the following, in this order
    rows: torch.Tensor  # int64 [sequences]: rows of the last tokens
    positions: torch.Tensor  # int64 [sequences]
    slot_mapping: tuple[torch.Tensor, ...]  # int64 [sequences], for each group
    context_lens: torch.Tensor  # int32 [sequences]

    @staticmethod
    def bytes(sequences: int, groups: int) -> int:
        """The size of the buffer in bytes."""
        return (2 + groups) * _span(sequences) + 4 * sequences

    @classmethod
    def over(cls, memory: torch.Tensor, sequences: int, groups: int) -> "GraphInputs":
        """Views of the first bytes of `memory`, uint8, for this number of sequences."""
        span = _span(sequences)
        starts = range(0, (2 + groups) * span, span)
        rows, positions, *slots = (
            memory[at : at + 8 * sequences].view(torch.int64) for at in starts
        )
        buffer = memory[: cls.bytes(sequences, groups)]
        context_lens = buffer[(2 + groups) * span :].view(torch.int32)
        return cls(buffer, rows, positions, tuple(slots), context_lens)

    def fill(self, step: DecodeInputs) -> None:
        """Set the inputs; the tensors of `step` are on the host or the device."""
        self.rows.copy_(step.rows)
        self.positions.copy_(step.positions)
        for own, given in zip(self.slot_mapping, step.slot_mapping, strict=True):
            own.copy_(given)
        self.context_lens.copy_(step.context_lens)


def _span(sequences: int) -> int:
    """Bytes from one int64 tensor to the next, a multiple of 16."""
    return 8 * (sequences + sequences % 2)


Decode = Callable[[torch.Tensor, ForwardBatch, torch.Tensor | None], torch.Tensor]
"""(Rows of the last tokens [sequences], a batch without its token ids, a buffer for the logits that
may be missing) → logits."""

Tail = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(Logits [sequences, vocab], rows and positions of the new tokens [sequences]) → tokens."""


class Replayed(NamedTuple):
    """Results of a replayed step, on the device; valid until the next one."""

    logits: torch.Tensor  # float32 [sequences, vocab]
    rows: torch.Tensor  # int64 [sequences]
    positions: torch.Tensor  # int32 [sequences], of the new tokens
    tokens: torch.Tensor | None  # int64 [sequences], if a tail was replayed

    def first(self, size: int) -> "Replayed":
        """The results of the first sequences; those after them are padding."""
        tokens = None if self.tokens is None else self.tokens[:size]
        return Replayed(self.logits[:size], self.rows[:size], self.positions[:size], tokens)


class DecodeGraphs:
    """One captured step for each size, all on the same buffers.

    The end of a step, from its logits to its tokens, is captured apart, once for each way to sample
    that a step may need: a second replay costs less than the model captured twice.
    """

    def __init__(
        self,
        decode: Decode,
        block_tables: SequenceOf[torch.Tensor],
        padding: tuple[int, int],
        logits: torch.Tensor | None,
        record: Record,
        knows_lengths: bool = False,
        tails: Mapping[str, Tail] = MappingProxyType({}),
    ):
        """Capture `decode` for batches of up to len(block_tables[0]) sequences.

        block_tables: int32 [sequences, blocks] for each layer group, with valid blocks. padding: a
        row and a slot that padding rows may write to. logits [sequences, vocab]: buffer for the
        results, since memory allocated in one capture is reused by the next. Without this
        buffer, a capture must cost no more than a step: sizes are then close to each other, each is
        captured when it first occurs, and the capture keeps its own results. knows_lengths: batches
        have the context lengths of each step on the host, for operations that are not captured.
        tails: by name, ends of a step that are captured as well, if there is a buffer for logits.
        """
        largest, device = len(block_tables[0]), block_tables[0].device
        # A CPU computes padding rows like any other, so there should be few of them.
        dense = _up_to(largest, *range(1, 17), *range(20, largest, 4))
        self.sizes = dense if logits is None else capture_sizes(largest)
        self._block_tables = block_tables
        self._memory = torch.zeros(
            GraphInputs.bytes(largest, len(block_tables)), dtype=torch.uint8, device=device
        )
        self._indices = torch.arange(largest + 1, device=device)
        self._starts = self._indices.int()
        self._decode, self._logits, self._record = decode, logits, record
        # Of the current step. Without operations that read it in every step it stays empty: a
        # capture would keep the lengths of its own step, and fails instead.
        self._host_context_lens: list[int] = []
        self._knows_lengths = knows_lengths
        self._inputs: dict[int, GraphInputs] = {}
        self._replay: dict[int, Compute] = {}
        self._tails: dict[tuple[str, int], Compute] = {}
        # Largest first: the memory of its capture is enough for the smaller ones. If sizes are
        # captured later, the smallest is captured and run now, to fail early if it cannot be.
        for size in [1] if logits is None else reversed(self.sizes):
            row, slot, zero = (torch.full((size,), at, device=device) for at in (*padding, 0))
            slots = [slot] * len(block_tables)
            inputs = self._inputs_of(size)
            inputs.fill(DecodeInputs(row, zero + 1, zero, slots))
            self._set_lengths([1] * size)
            self._captured(size)
            if logits is None:
                continue
            for name, tail in tails.items():
                sample = partial(tail, logits[:size], inputs.rows, inputs.context_lens)
                self._tails[name, size] = record(sample)
        if logits is None:
            self._captured(1)()

    def _inputs_of(self, size: int) -> GraphInputs:
        if size not in self._inputs:
            self._inputs[size] = GraphInputs.over(self._memory, size, len(self._block_tables))
        return self._inputs[size]

    def _captured(self, size: int) -> Compute:
        if size not in self._replay:
            self._replay[size] = self._record(partial(self._compute, size))
        return self._replay[size]

    def padded_size(self, sequences: int) -> int:
        """The captured size to which a batch of this many sequences is padded."""
        return self.sizes[bisect_left(self.sizes, sequences)]

    def set_block_tables(self, block_tables: SequenceOf[torch.Tensor]) -> None:
        """Set the block tables int32 [sequences, blocks] of the following steps, for each group.

        They may be on the host; if they are pinned, this does not wait for the device.
        """
        for own, given in zip(self._block_tables, block_tables, strict=True):
            own[: len(given), : given.shape[1]].copy_(given, non_blocking=True)

    def __call__(
        self,
        step: DecodeInputs,
        tail: str = "",
        before_tail: Callable[[], None] | None = None,
    ) -> Replayed:
        """Replay a step, and its end of this name if that is captured.

        The number of sequences is one of the sizes. Does not wait for the device. before_tail: is
        called between the two.
        """
        size = len(step.rows)
        inputs = self._inputs_of(size)
        if self._memory.device.type == "cpu":
            inputs.fill(step)
        else:  # each copy is a launch, so all inputs are copied at once
            staged = torch.empty(inputs.buffer.shape, dtype=torch.uint8, pin_memory=True)
            GraphInputs.over(staged, size, len(self._block_tables)).fill(step)
            inputs.buffer.copy_(staged, non_blocking=True)
        if self._knows_lengths:
            self._set_lengths(step.context_lens.tolist())
        logits = self._captured(size)()
        if before_tail is not None:
            before_tail()
        sample = self._tails.get((tail, size))
        tokens = None if sample is None else sample()
        return Replayed(logits, inputs.rows, inputs.context_lens, tokens)

    def _set_lengths(self, context_lens: list[int]) -> None:
        if self._knows_lengths:
            self._host_context_lens[:] = context_lens

    def _compute(self, size: int) -> torch.Tensor:
        inputs = self._inputs_of(size)
        batch = ForwardBatch(
            token_ids=inputs.rows,
            positions=inputs.positions,
            host_query_lens=[1] * size,
            host_context_lens=self._host_context_lens,
            num_single=size,
            groups=tuple(
                GroupTables(table[:size], slots)
                for table, slots in zip(self._block_tables, inputs.slot_mapping, strict=True)
            ),
            logits_rows=self._indices[:size],
            cu_seqlens_q=self._starts[: size + 1],
            context_lens=inputs.context_lens,
        )
        out = None if self._logits is None else self._logits[:size]
        return self._decode(inputs.rows, batch, out)
