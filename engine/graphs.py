"""Decode steps of fixed sizes, captured once and replayed: one launch instead of hundreds.

On a GPU as its graphs, on a CPU as a list of the kernels' calls.

A captured step reads its inputs from buffers that stay where they are. A batch is padded to the
next size there is, with rows that write to a block of their own and whose logits nobody reads.
"""

import itertools
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from engine.stats import EngineStats
from model.batch import ForwardBatch, GroupTables

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


class DecodeGraphs:
    """One captured step a size, all over the same buffers."""

    def __init__(
        self,
        forward: Callable[[ForwardBatch], torch.Tensor],
        buffers: ForwardBatch,
        logits: torch.Tensor | None,
        capture: Capture,
    ):
        """Capture `forward` for batches as long as the buffers and for smaller ones.

        buffers: a batch that can run as it is, one token a sequence (`padding`); logits
        [sequences, vocab]: where results are put, since what is allocated in one capture is used
        again by the next. Without logits sizes are close to each other, each is captured when it
        is first met, and the capture sees to its results: for where captures cost no more than a
        step.
        """
        most = len(buffers.seen)
        # On a CPU rows that nobody needs are computed like others: few of them.
        each = _up_to(most, *range(1, 17), *range(20, most, 4))
        self.sizes = each if logits is None else sizes(most)
        self._inputs = {size: _first(buffers, size) for size in self.sizes}
        self._forward, self._logits, self._capture = forward, logits, capture
        self._replay: dict[int, Compute] = {}
        if logits is None:
            self._captured(1)()  # whether it can be done shows now
            return
        for size in reversed(self.sizes):  # the smaller ones fit where the largest was
            self._captured(size)

    def _captured(self, size: int) -> Compute:
        if size not in self._replay:
            self._replay[size] = self._capture(partial(self._compute, self._inputs[size]))
        return self._replay[size]

    def size(self, sequences: int) -> int:
        """The size that a batch of so many sequences is to be padded to."""
        return self.sizes[bisect_left(self.sizes, sequences)]

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits [sequences, vocab] of a batch of one of the sizes, valid until the next call.

        Its tensors may be on the host; none of this waits for the device if they are pinned.
        """
        size = len(batch.seen)
        inputs = self._inputs[size]
        pairs = [
            (inputs.token_ids, batch.token_ids),
            (inputs.positions, batch.positions),
            (inputs.seen, batch.seen),
        ]
        for mine, given in zip(inputs.groups, batch.groups, strict=True):
            width = given.block_table.shape[1]
            pairs += [(mine.block_table[:, :width], given.block_table), (mine.slots, given.slots)]
        for buffer, values in pairs:
            buffer.copy_(values, non_blocking=True)
        return self._captured(size)()

    def _compute(self, inputs: ForwardBatch) -> torch.Tensor:
        logits = self._forward(inputs)
        return logits if self._logits is None else self._logits[: len(inputs.seen)].copy_(logits)


def padding(
    sequences: int,
    windows: list[int | None],
    width: int,
    block: int,
    slot: int,
    device: torch.device,
) -> ForwardBatch:
    """A batch of sequences of one token each, all in one slot of one block.

    width: of the block tables. What changes from step to step is not in its lists, so that a
    capture cannot hold on to it.
    """

    def full(shape: tuple[int, ...], value: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    return ForwardBatch(
        token_ids=full((sequences,), 0, torch.int64),
        positions=full((sequences,), 0, torch.int64),
        query_lens=[1] * sequences,
        context_lens=[],
        num_single=sequences,
        groups=tuple(
            GroupTables(
                window,
                full((sequences, width), block, torch.int32),
                full((sequences,), slot, torch.int64),
            )
            for window in windows
        ),
        logits_rows=torch.arange(sequences, device=device),
        query_starts=torch.arange(sequences + 1, dtype=torch.int32, device=device),
        seen=full((sequences,), 1, torch.int32),
    )


def _first(batch: ForwardBatch, count: int) -> ForwardBatch:
    """The batch's first sequences, in the same memory."""
    return replace(
        batch,
        token_ids=batch.token_ids[:count],
        positions=batch.positions[:count],
        query_lens=batch.query_lens[:count],
        num_single=count,
        groups=tuple(
            GroupTables(group.window, group.block_table[:count], group.slots[:count])
            for group in batch.groups
        ),
        logits_rows=batch.logits_rows[:count],
        query_starts=batch.query_starts[: count + 1],
        seen=batch.seen[:count],
    )


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
