"""Decode steps of fixed sizes, captured once and replayed: one launch instead of hundreds.

On a GPU as its graphs, on a CPU as a list of the kernels' calls.

A captured step reads its inputs from buffers that stay where they are, and the last tokens from
where they were sampled. A batch is padded to the next size there is, with rows that write to a
block of their own and whose logits nobody reads.
"""

import itertools
import time
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial

import torch

from engine.stats import EngineStats
from model.ops.forward_batch import ForwardBatch, GroupTables

Compute = Callable[[], torch.Tensor]
Capture = Callable[[Compute], Compute]
"""Makes of a computation one that does the same again, over what its buffers then hold; over what
they hold now, if it is called at once."""


def sizes(most: int) -> list[int]:
    """Batch sizes to capture for batches of up to `most`: 1, 2, 4, 8, 16, … 128, 144, … `most`.

    Steps of 8, from 128 on eight to each doubling: padding adds an eighth of the rows at most to
    large batches, and each size is run and captured before a job begins.
    """
    starts = [8 << i for i in range((most // 8).bit_length())]
    steps = (range(start, 2 * start, max(8, start // 8)) for start in starts)
    return _up_to(most, 1, 2, 4, *itertools.chain.from_iterable(steps))


def _up_to(most: int, *wanted: int) -> list[int]:
    return sorted({size for size in wanted if size < most} | {most})


@dataclass(frozen=True)
class Inputs:
    """What a captured step reads besides block tables: integers in one piece of memory.

    The spans begin at multiples of 16 bytes, whatever the size: kernels are compiled for that.
    """

    integers: torch.Tensor  # uint8: all of the following, in this order
    rows: torch.Tensor  # int64 [sequences]: where each one's last token is
    positions: torch.Tensor  # int64 [sequences]
    slots: tuple[torch.Tensor, ...]  # int64 [sequences], of each group
    seen: torch.Tensor  # int32 [sequences]

    @staticmethod
    def bytes(sequences: int, groups: int) -> int:
        """What the integers take."""
        return (2 + groups) * _span(sequences) + 4 * sequences

    @classmethod
    def over(cls, memory: torch.Tensor, sequences: int, groups: int) -> "Inputs":
        """So many sequences in the first bytes of memory, uint8."""
        span = _span(sequences)
        places = range(0, (2 + groups) * span, span)
        rows, positions, *slots = (
            memory[at : at + 8 * sequences].view(torch.int64) for at in places
        )
        integers = memory[: cls.bytes(sequences, groups)]
        seen = integers[(2 + groups) * span :].view(torch.int32)
        return cls(integers, rows, positions, tuple(slots), seen)

    def fill(
        self, rows: torch.Tensor, positions: torch.Tensor, slots: SequenceOf[torch.Tensor]
    ) -> None:
        """Set the integers; arguments as the fields, on the host or the device."""
        self.rows.copy_(rows)
        self.positions.copy_(positions)
        for own, given in zip(self.slots, slots, strict=True):
            own.copy_(given)
        torch.add(positions, 1, out=self.seen)


def _span(sequences: int) -> int:
    """Bytes from one span of int64 to the next."""
    return 8 * (sequences + sequences % 2)


Decode = Callable[[torch.Tensor, ForwardBatch], torch.Tensor]
"""rows [sequences] of their last tokens, and a batch that has no token ids yet → logits."""


class DecodeGraphs:
    """One captured step a size, all over the same buffers."""

    def __init__(
        self,
        decode: Decode,
        tables: SequenceOf[torch.Tensor],
        spare: tuple[int, int],
        logits: torch.Tensor | None,
        capture: Capture,
    ):
        """Capture `decode` for batches as long as the tables and for smaller ones.

        tables: of each group of layers, int32 [sequences, blocks] that can be
        read as they are. spare: a row and a slot that padding may write to. logits [sequences,
        vocab]: where results are put, since what is allocated in one capture is used again by the
        next. Without logits sizes are close to each other, each is captured when it is first met,
        and the capture sees to its results: for where captures cost no more than a step.
        """
        most, device = len(tables[0]), tables[0].device
        # On a CPU rows that nobody needs are computed like others: few of them.
        each = _up_to(most, *range(1, 17), *range(20, most, 4))
        self.sizes = each if logits is None else sizes(most)
        self._tables = tables
        self._memory = torch.zeros(
            Inputs.bytes(most, len(tables)), dtype=torch.uint8, device=device
        )
        self._indices = torch.arange(most + 1, device=device)
        self._starts = self._indices.int()
        self._decode, self._logits, self._capture = decode, logits, capture
        self._replay: dict[int, Compute] = {}
        # The smaller ones fit where the largest was. Where the others come later, the least is
        # run now: whether it can be done shows.
        row, slot = (torch.full((most,), at, device=device) for at in spare)
        for size in [1] if logits is None else reversed(self.sizes):
            inputs = Inputs.over(self._memory, size, len(tables))
            inputs.fill(row[:size], row[:size] * 0, [slot[:size]] * len(tables))
            self._captured(size)
        if logits is None:
            self._captured(1)()

    def _captured(self, size: int) -> Compute:
        if size not in self._replay:
            self._replay[size] = self._capture(partial(self._compute, size))
        return self._replay[size]

    def size(self, sequences: int) -> int:
        """The size that a batch of so many sequences is to be padded to."""
        return self.sizes[bisect_left(self.sizes, sequences)]

    def place(self, tables: SequenceOf[torch.Tensor]) -> None:
        """Set the block tables int32 [sequences, blocks] of the steps to come, of each group.

        May be on the host; does not wait for the device if they are pinned, nor does a call.
        """
        for own, given in zip(self._tables, tables, strict=True):
            own[: len(given), : given.shape[1]].copy_(given, non_blocking=True)

    def __call__(
        self, rows: torch.Tensor, positions: torch.Tensor, slots: SequenceOf[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(Rows on the device, logits [sequences, vocab]) of a step of one of the sizes.

        Both are valid until the next call. Arguments as in `Inputs`, on the host.
        """
        size, groups = len(rows), len(self._tables)
        inputs = Inputs.over(self._memory, size, groups)
        # On a GPU a copy is a launch of its own in every step: one for all of them.
        staged = torch.empty(
            inputs.integers.shape, dtype=torch.uint8, pin_memory=self._memory.device.type != "cpu"
        )
        Inputs.over(staged, size, groups).fill(rows, positions, slots)
        inputs.integers.copy_(staged, non_blocking=True)
        return inputs.rows, self._captured(size)()

    def _compute(self, size: int) -> torch.Tensor:
        inputs = Inputs.over(self._memory, size, len(self._tables))
        batch = ForwardBatch(
            token_ids=inputs.rows,
            positions=inputs.positions,
            host_query_lens=[1] * size,
            host_context_lens=[],  # changes from step to step, and a capture would hold on to it
            num_single=size,
            groups=tuple(
                GroupTables(table[:size], slots)
                for table, slots in zip(self._tables, inputs.slots, strict=True)
            ),
            logits_rows=self._indices[:size],
            cu_seqlens_q=self._starts[: size + 1],
            context_lens=inputs.seen,
        )
        logits = self._decode(inputs.rows, batch)
        return logits if self._logits is None else self._logits[:size].copy_(logits)


def gpu_capture(stats: EngineStats) -> Capture:
    """Capture as CUDA graphs (HIP graphs on AMD), which share their memory.

    Counts in stats what the first run of each step took, before its capture. Raises RuntimeError
    without a GPU, before any rank waits for another.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU to capture steps on")
    pool = torch.cuda.graph_pool_handle()
    # One for all: on each stream that it meets cuBLAS keeps memory of its own, tens of megabytes.
    stream = torch.cuda.Stream()

    def capture(compute: Compute) -> Compute:
        # Once before: kernels are compiled and libraries set up, which cannot be captured.
        start = time.perf_counter()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        stream.synchronize()
        stats.compile_s += time.perf_counter() - start
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                result = compute()
        finally:
            torch.cuda.set_stream(current)  # torch leaves its own in place if the capture fails

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    return capture
