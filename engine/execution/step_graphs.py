"""The captured steps of a runner: steps of decodes alone, and small steps with chunks."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.execution.capture import CaptureMode, Record
from engine.execution.chunk_graphs import ChunkGraphs
from engine.execution.decode_graphs import DecodeGraphs, Replayed, Tail
from engine.execution.sampler import Sampler
from engine.execution.transfer import pin
from engine.parallel.step_message import StepMessage
from engine.sampling_params import SamplingParams
from model.ops.backend import Backend
from model.ops.forward_batch import ForwardBatch
from model.sharding import Shard

if TYPE_CHECKING:
    from engine.execution.model_runner import ModelRunner

_GREEDY, _SAMPLED, _ADJUSTED = "greedy", "sampled", "adjusted"  # names of captured ends of steps


class StepGraphs:
    """Captures the steps of a runner that has memory for them, and replays them."""

    def __init__(
        self,
        runner: "ModelRunner",
        record: Record,
        ops: Backend,
        mode: CaptureMode | None,
        max_batch_tokens: int = 0,
    ):
        """Capture with a backend; mode None: each batch size when it first occurs.

        Whole steps are also captured with chunks, of up to max_batch_tokens tokens.
        """
        batches, sampler = runner.batches, runner.sampler
        if batches is None or sampler is None:
            raise RuntimeError("call allocate() before capture()")
        self._batches, self._device = batches, runner.device
        rows, width, groups = batches.padding_row, batches.width, len(runner.groups)
        padding_block = runner.kv_caches[0].shape[1] - 1
        self._block_size = block_size = runner.block_size
        device = runner.device
        logits = None if mode is None else runner.empty_logits(rows)
        is_whole = mode in (CaptureMode.WHOLE, CaptureMode.PLAIN_LAUNCH)
        # Rows whose block tables the graphs have now, and the longest context length in blocks.
        self._tables: tuple[list[int], int] | None = None
        self._decodes = DecodeGraphs(
            partial(_decode, runner, ops),
            [
                torch.full((rows, width), padding_block, dtype=torch.int32, device=device)
                for _ in range(groups)
            ],
            (rows, padding_block * block_size),
            logits,
            record,
            knows_lengths=mode == CaptureMode.PARTS,
            tails=_tails(sampler.on(ops), runner.shard) if is_whole else {},
        )
        self._chunks: ChunkGraphs | None = None
        if logits is not None and is_whole:
            self._chunks = ChunkGraphs(
                partial(runner.forward_on, ops),
                [width] * groups,
                padding_block,
                block_size,
                (rows, min(max_batch_tokens, width * block_size)),
                logits,
                record,
            )

    def update_tables(self) -> None:
        """Copy the block tables again before the next replay, because some have changed."""
        self._tables = None

    def replay_chunks(self, batch: ForwardBatch) -> torch.Tensor | None:
        """The logits of a step with chunks; None if such a step is not captured."""
        return None if self._chunks is None else self._chunks(batch)

    def replay_decodes(
        self,
        message: StepMessage,
        non_greedy: Mapping[int, SamplingParams],
        before_sampling: Callable[[], None] | None = None,
    ) -> Replayed:
        """Replay a step of decodes, padded; returns the results of its sequences.

        The tokens are sampled as well, unless log-probabilities are needed. before_sampling: is
        called when the logits have been launched.
        """
        tail = _GREEDY if message.all_greedy else _tail(non_greedy.values())
        batches, graphs, size = self._batches, self._decodes, message.size
        padding = graphs.padded_size(size) - size
        rows = [*message.rows, *[batches.padding_row] * padding]
        inputs = batches.decode_inputs(rows, [*message.context_lens, *[1] * padding])
        longest = max(message.context_lens)
        blocks = -(-longest // self._block_size)
        if (rows, blocks) != self._tables:
            tables = batches.select_tables(inputs.rows, longest)
            graphs.set_block_tables([pin(table, self._device) for table in tables])
            self._tables = rows, blocks
        return graphs(inputs, tail, before_sampling).first(size)


def _tails(sampler: Sampler, shard: Shard) -> dict[str, Tail]:
    """The ends of steps that are captured; others run after the replay."""
    tails: dict[str, Tail] = {
        _GREEDY: lambda logits, rows, positions: sampler.sample_greedy(logits, rows)
    }
    if shard.size == 1:  # else rank 0 gathers the logits of all ranks
        tails[_SAMPLED] = sampler.sample_rows
        sampler.adjustments.allocate()  # not in a capture, whose memory is its own
        tails[_ADJUSTED] = sampler.sample_adjusted
    return tails


def _tail(params: Collection[SamplingParams]) -> str:
    """The end of a step with sequences that are not greedy; "": one that is not captured."""
    if any(each.logprobs is not None for each in params):
        return ""
    return _ADJUSTED if any(each.adjusts_logits for each in params) else _SAMPLED


# A function: as a method it would keep the graphs, and their memory, until a garbage collection.
def _decode(
    runner: "ModelRunner",
    ops: Backend,
    rows: torch.Tensor,
    batch: ForwardBatch,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Logits of a batch of decodes; its tokens are those that the rows sampled last."""
    assert runner.sampler is not None
    batch.token_ids = ops.gather(runner.sampler.last.unsqueeze(1), rows).squeeze(1)
    batch.state_rows = rows if runner.states else None
    return runner.forward_on(ops, batch, out)
