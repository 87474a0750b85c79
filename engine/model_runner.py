"""A step → ForwardBatch → logits → next tokens. Owns the model and the KV tensors."""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from engine.decode_graphs import Capture, DecodeGraphs
from engine.kv_cache import NULL_BLOCK, BlockTables, LayerGroup, group_layers
from engine.parallel.step_message import StepMessage
from engine.request import Request, SamplingParams
from engine.sampler import Sampled, Sampler, pin, put
from engine.scheduler import Chunk, Sequence, Step
from model import ModelConfig, Transformer
from model import loader as weights
from model.ops.backend import choose_backend
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.step_parts import BATCH_PREPARATION, SAMPLING
from model.sharding import ALONE, Shard

_LIKELY_TOKENS = 256  # of a sequence
_MOST_TOUCHED = 256 << 20  # bytes


class ModelRunner:
    """The model on its device, and by row what running sequences have there.

    That is their KV, their block tables and, in the sampler, their last tokens. With a shard, it
    is one rank's part of it: every rank's runner is told the same, in the same order.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        shard: Shard = ALONE,
    ):
        self.config, self.device, self.dtype, self.shard = config, device, dtype, shard
        self.groups: list[LayerGroup] = group_layers([layer.window for layer in config.layers])
        self._places = [(0, 0)] * len(config.layers)
        for g, group in enumerate(self.groups):
            for i, layer in enumerate(group.layers):
                self._places[layer] = (g, i)
        self.backend = choose_backend(device, dtype)
        self._model: Transformer | None = None
        self._caches: list[torch.Tensor] = []
        self._sampler: Sampler | None = None
        self._graphs: DecodeGraphs | None = None
        self._block_size = 0
        # For each group int32 [rows, blocks of a sequence]: written as arrays, read as tensors.
        self._tables: list[array] = []
        self._views: list[torch.Tensor] = []
        self._width = 0
        # Rows whose block tables the graphs have now, and how many blocks of each.
        self._placed: tuple[list[int], int] | None = None

    def load(self, checkpoint: Path, dummy: bool) -> None:
        """Load the weights (random ones if dummy). Raises CheckpointError."""
        model = Transformer(self.config, self.shard)
        if dummy:
            weights.load_dummy(model, self.backend)
        else:
            weights.load(model, checkpoint, self.backend)
        self._model = model

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one KV block over all layers of a group."""
        layers = max(len(group.layers) for group in self.groups)
        heads, size = self._kv_heads, self.config.head_dim
        return 2 * layers * block_size * heads * size * self.dtype.itemsize

    @property
    def _kv_heads(self) -> int:
        part = self.shard.kv_part(self.config.num_kv_heads)
        return part.stop - part.start

    def allocate(
        self, num_blocks: int, block_size: int, max_positions: int, max_batch_size: int
    ) -> None:
        """Allocate the KV tensors, the rotary table and what there is for each row.

        One block and one row more than asked for are those of padding.
        """
        if self._model is None:
            raise RuntimeError("load() comes before allocate()")
        self._block_size = block_size
        shape = (2, num_blocks + 1, block_size, self._kv_heads, self.config.head_dim)
        self._caches = [
            self.backend.empty_cache(shape)
            for _ in range(max(len(group.layers) for group in self.groups))
        ]
        # Only the null block is ever read before it is written. On a CPU what a first batch is
        # likely to take is touched now, which would else make its steps slower; the rest of a
        # large pool costs nothing until it is used.
        touched = NULL_BLOCK + 1
        if self.device.type == "cpu":
            likely = min(
                max_batch_size * _LIKELY_TOKENS // block_size,
                _MOST_TOUCHED // self.block_bytes(block_size),
                num_blocks,
            )
            touched += likely
        for cache in self._caches:
            cache[:, :touched].zero_()
        self._model.prepare_rope(max_positions, self.device)
        self._sampler = Sampler(
            max_batch_size + 1, self.backend, self.shard, self.config.vocab_size
        )
        self._width = -(-max_positions // block_size)
        rows = array("i", bytes(4 * max_batch_size * self._width))
        rows += array("i", [num_blocks]) * self._width
        self._tables = [rows[:] for _ in self.groups]
        self._views = [
            torch.frombuffer(table, dtype=torch.int32).view(-1, self._width)
            for table in self._tables
        ]

    def rehearse(
        self, max_batch_size: int, max_batch_tokens: int, max_positions: int, block_size: int
    ) -> None:
        """Run the step that needs the most memory, every row sampled in full; then short ones.

        Those are prompts of one sequence, each twice as long as the one before: kernels have
        forms for few tokens and for many, and all of them are compiled now. Waits for each step
        and leaves nothing allocated. They read and write the null block alone.
        """
        self.allocate(1, block_size, max_positions, max_batch_size)
        size = min(max_batch_size, max_batch_tokens)
        length = min(max_batch_tokens // size, max_positions)
        most = min(max_batch_tokens, max_positions)
        in_full = SamplingParams(temperature=1, top_p=0.9, logprobs=20)
        self.launch(self._prompts(size, length, in_full)).read()
        for doubled in range(most.bit_length()):
            self.launch(self._prompts(1, 1 << doubled, SamplingParams())).read()
        self.deallocate()

    def _prompts(self, count: int, length: int, params: SamplingParams) -> Step:
        """A step of so many prompts of one length, all in the null block."""
        step = Step()
        for row in range(count):
            blocks = array("i", [NULL_BLOCK]) * -(-length // self._block_size)
            tokens, tables = [0] * length, BlockTables([blocks] * len(self.groups))
            request = Request(tokens, params)
            sequence = Sequence(request, tokens, length + 1, frozenset(), tables, 0.0, row=row)
            step.grown.append(sequence)
            step.chunks.append(Chunk(sequence, 0, length, samples=True))
            step.ends.append(length)
        return step

    @torch.inference_mode()
    def capture(self, capture: Capture, ahead_of_time: bool = True) -> None:
        """Capture the steps in which every sequence decodes; `launch` then replays them.

        Prefetcher of time: a few sizes now, else each size when it is first met.
        """
        if self._sampler is None:
            raise RuntimeError("allocate() comes before capture()")
        most, block = len(self._sampler.last) - 1, self._caches[0].shape[1] - 1
        part = self.shard.vocab_part(self.config.vocab_size)
        self._placed = None
        self._graphs = DecodeGraphs(
            self._decode,
            [
                torch.full((most, self._width), block, dtype=torch.int32, device=self.device)
                for _ in self.groups
            ],
            (most, block * self._block_size),
            torch.empty(most, part.stop - part.start, dtype=self.dtype, device=self.device)
            if ahead_of_time
            else None,
            capture,
        )

    def _forward(self, batch: ForwardBatch) -> torch.Tensor:
        assert self._model is not None
        return self._model(self.backend, batch, self._caches, self._places)

    def _decode(self, rows: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Logits of a batch of the tokens that these rows sampled last."""
        assert self._sampler is not None
        last = self.backend.gather(self._sampler.last.unsqueeze(1), rows)
        return self._forward(replace(batch, token_ids=last.squeeze(1)))

    def free(self) -> None:
        """Drop weights, KV and what was captured."""
        self._model = None
        self.deallocate()

    def deallocate(self) -> None:
        """Drop all but the weights."""
        self.uncapture()
        self._sampler = None
        self._caches = []
        self._tables, self._views = [], []

    def uncapture(self) -> None:
        """Drop captured steps: what they did is computed anew."""
        self._graphs = None

    def launch(self, step: Step) -> Sampled:
        """Start the step; gives the next token of each of `step.sampling()`, to be read later."""
        if self._model is None or self._sampler is None:
            raise RuntimeError("the engine is not warmed up")
        entering = [c.sequence for c in step.chunks if c.samples and not c.sequence.greedy]
        if entering:
            self._sampler.enter(
                [sequence.row for sequence in entering],
                [sequence.request.params for sequence in entering],
            )
        special = {i: s.request.params for i, s in enumerate(step.sampling()) if not s.greedy}
        return self.compute(StepMessage.of(step, bool(special)), special)

    @torch.inference_mode()
    def compute(self, work: StepMessage, special: Mapping[int, SamplingParams]) -> Sampled:
        """Start the work; special as in `Sampler.sample`, and known to rank 0 alone."""
        assert self._sampler is not None
        self._note_blocks(work)
        if self._graphs is None or work.starts:
            with BATCH_PREPARATION:
                batch, rows, positions = self._batch(work, self._sampler.last)
            logits = self._forward(batch)
        else:
            logits, rows, positions = self._replay(self._graphs, work, len(self._sampler.last) - 1)
        with SAMPLING:
            return self._sampler.sample(logits, rows, positions, special, work.drawn)

    def _note_blocks(self, work: StepMessage) -> None:
        for row, tables in work.tables:
            first = row * self._width
            for flat, table in zip(self._tables, tables, strict=True):
                flat[first : first + len(table)] = table
        if work.tables:
            self._placed = None

    def _replay(
        self, graphs: DecodeGraphs, work: StepMessage, spare: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The logits of a step of decodes, and what else `_batch` gives; spare: padding's row."""
        pad = graphs.size(work.size) - work.size
        rows = [*work.rows, *[spare] * pad]
        at, ends = _tensor(rows), _tensor([*work.ends, *[1] * pad])
        positions = ends - 1
        blocks, offsets = positions // self._block_size, positions % self._block_size
        slots = [tables[at, blocks] * self._block_size + offsets for tables in self._views]
        width = -(-max(work.ends) // self._block_size)
        if (rows, width) != self._placed:
            tables = [view[:, :width].index_select(0, at) for view in self._views]
            graphs.place([pin(table, self.device) for table in tables])
            self._placed = rows, width
        own, logits = graphs(at, positions, slots)
        ends = ends[: work.size]
        upto = put(ends, self.device) if work.drawn else ends
        return logits[: work.size], own[: work.size], upto

    def _batch(
        self, work: StepMessage, last: torch.Tensor
    ) -> tuple[ForwardBatch, torch.Tensor, torch.Tensor]:
        """The work's batch, and of each sequence that samples its row and the new token's index.

        last int64 [rows]: the token that each row sampled last.
        """
        decodes, size, device = work.decodes, work.size, self.device
        chunks = list(zip(work.starts, work.ends[decodes:], strict=True))
        query_lens = [1] * decodes + [end - start for start, end in chunks]
        singles = query_lens.count(1)  # which come first
        context_lens = list(work.ends)
        rows, ends = _tensor(work.rows), _tensor(context_lens)
        positions, owners = ends[:singles] - 1, torch.arange(size)
        query_ends = owners + 1
        if singles < size:
            ranges = [torch.arange(start, end) for start, end in chunks[singles - decodes :]]
            positions = torch.cat((positions, *ranges))
            lengths = _tensor(query_lens)
            owners, query_ends = owners.repeat_interleave(lengths), lengths.cumsum(0)
        blocks, offsets = positions // self._block_size, positions % self._block_size
        width = -(-max(context_lens) // self._block_size)
        groups = []
        for tables in self._views:
            table = tables[:, :width].index_select(0, rows)
            slots = table[owners, blocks] * self._block_size + offsets
            groups.append(GroupTables(put(table, device), put(slots, device)))
        logits_rows, sampling, upto = query_ends - 1, rows, ends
        if not all(work.samples):
            kept = torch.tensor([1] * decodes + [*work.samples]).bool()
            logits_rows, sampling, upto = logits_rows[kept], sampling[kept], upto[kept]
        token_ids = last[put(rows[:decodes], device)]
        if chunks:
            token_ids = torch.cat((token_ids, put(_tensor(work.tokens), device)))
        batch = ForwardBatch(
            token_ids=token_ids,
            positions=put(positions, device),
            host_query_lens=query_lens,
            host_context_lens=context_lens,
            num_single=singles,
            groups=tuple(groups),
            logits_rows=put(logits_rows, device),
            cu_seqlens_q=put(torch.nn.functional.pad(query_ends, (1, 0)).int(), device),
            context_lens=put(ends.int(), device),
        )
        return batch, put(sampling, device), put(upto, device) if work.drawn else upto


def _tensor(values: Iterable[int]) -> torch.Tensor:
    """As torch.tensor(values), which takes eight times as long."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)
