"""A step → ForwardBatch → logits → next tokens. Owns the model and the KV tensors."""

import itertools
from array import array
from collections.abc import Iterable
from pathlib import Path

import torch

from engine.kv_cache import NULL_BLOCK, LayerGroup, group_layers
from engine.sampler import Sampled, Sampler, put
from engine.scheduler import Sequence, Step
from model import ModelConfig, Transformer, weights
from model.batch import ForwardBatch, GroupTables


class ModelRunner:
    """The model on its device, and by row what running sequences have there.

    That is their KV, their block tables and, in the sampler, their last tokens.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.groups: list[LayerGroup] = group_layers([layer.window for layer in config.layers])
        self._places = [(0, 0)] * len(config.layers)
        for g, group in enumerate(self.groups):
            for i, layer in enumerate(group.layers):
                self._places[layer] = (g, i)
        self._model: Transformer | None = None
        self._caches: list[torch.Tensor] = []
        self._sampler: Sampler | None = None
        self._block_size = 0
        # For each group int32 [rows, blocks of a sequence]: written as arrays, read as tensors.
        self._tables: list[array] = []
        self._views: list[torch.Tensor] = []
        self._width = 0

    def load(self, checkpoint: Path, dummy: bool) -> None:
        """Load the weights (random ones if dummy). Raises CheckpointError."""
        model = Transformer(self.config)
        if dummy:
            weights.load_dummy(model, self.dtype, self.device)
        else:
            weights.load(model, checkpoint, self.dtype, self.device)
        self._model = model

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one KV block over all layers of a group."""
        layers = max(len(group.layers) for group in self.groups)
        heads, size = self.config.num_kv_heads, self.config.head_dim
        return 2 * layers * block_size * heads * size * self.dtype.itemsize

    def allocate(
        self, num_blocks: int, block_size: int, max_positions: int, max_batch_size: int
    ) -> None:
        """Allocate the KV tensors, the rotary table and what there is for each row."""
        if self._model is None:
            raise RuntimeError("load() comes before allocate()")
        self._block_size = block_size
        shape = (2, num_blocks, block_size, self.config.num_kv_heads, self.config.head_dim)
        self._caches = [
            torch.empty(shape, dtype=self.dtype, device=self.device)
            for _ in range(max(len(group.layers) for group in self.groups))
        ]
        # Only the null block is ever read before it is written; memory of the others is not
        # touched, so on a CPU a large pool costs nothing until it is used.
        for cache in self._caches:
            cache[:, NULL_BLOCK].zero_()
        self._model.prepare_rope(max_positions, self.device)
        self._sampler = Sampler(max_batch_size, self.device)
        self._width = -(-max_positions // block_size)
        self._tables = [array("i", bytes(4 * max_batch_size * self._width)) for _ in self.groups]
        self._views = [
            torch.frombuffer(table, dtype=torch.int32).view(-1, self._width)
            for table in self._tables
        ]

    def free(self) -> None:
        """Drop weights and KV."""
        self._model = None
        self._sampler = None
        self._caches = []
        self._tables, self._views = [], []

    @torch.inference_mode()
    def launch(self, step: Step) -> Sampled:
        """Start the step; gives the next token of each of `step.sampling()`, to be read later."""
        if self._model is None or self._sampler is None:
            raise RuntimeError("the engine is not warmed up")
        self._note_blocks(step.grown)
        batch, rows, positions = self._batch(step, self._sampler.last)
        logits = self._model(batch, self._caches, self._places)
        entering = [c.sequence for c in step.chunks if c.samples and not c.sequence.greedy]
        if entering:
            self._sampler.enter(
                [sequence.row for sequence in entering],
                [sequence.request.params for sequence in entering],
            )
        special = {i: s.request.params for i, s in enumerate(step.sampling()) if not s.greedy}
        return self._sampler.sample(logits, rows, positions, special)

    def _note_blocks(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            first = sequence.row * self._width
            for flat, table in zip(self._tables, sequence.tables.tables, strict=True):
                flat[first : first + len(table)] = table

    def _batch(
        self, step: Step, last: torch.Tensor
    ) -> tuple[ForwardBatch, torch.Tensor, torch.Tensor]:
        """The step's batch, and of each sequence that samples its row and the new token's index.

        last int64 [rows]: the token that each row sampled last.
        """
        decodes, chunks, size = len(step.decodes), step.chunks, step.size
        query_lens = [1] * decodes + [chunk.end - chunk.start for chunk in chunks]
        singles = query_lens.count(1)  # which come first
        rows = _tensor(
            [sequence.row for sequence in step.decodes] + [chunk.sequence.row for chunk in chunks]
        )
        ends = _tensor(step.ends)
        positions, owners = ends[:singles] - 1, torch.arange(size)
        query_ends = owners + 1
        if singles < size:
            ranges = [torch.arange(chunk.start, chunk.end) for chunk in chunks[singles - decodes :]]
            positions = torch.cat((positions, *ranges))
            lengths = _tensor(query_lens)
            owners, query_ends = owners.repeat_interleave(lengths), lengths.cumsum(0)
        blocks, offsets = positions // self._block_size, positions % self._block_size
        width = -(-max(step.ends) // self._block_size)
        groups = []
        for group, tables in zip(self.groups, self._views, strict=True):
            table = tables[:, :width].index_select(0, rows)
            slots = table[owners, blocks] * self._block_size + offsets
            groups.append(GroupTables(group.window, self._put(table), self._put(slots)))
        on_device = self._put(rows)
        token_ids = last[on_device[:decodes]]
        if chunks:
            known = [chunk.sequence.tokens[chunk.start : chunk.end] for chunk in chunks]
            fresh = _tensor(itertools.chain.from_iterable(known))
            token_ids = torch.cat((token_ids, self._put(fresh)))
        samples = [chunk.samples for chunk in chunks]
        logits_rows, seen = query_ends - 1, ends.int()
        sampling_rows, next_positions = on_device, self._put(seen)
        if not all(samples):
            kept = torch.tensor([True] * decodes + samples)
            logits_rows = logits_rows[kept]
            sampling_rows, next_positions = self._put(rows[kept]), self._put(seen[kept])
        batch = ForwardBatch(
            token_ids=token_ids,
            positions=self._put(positions),
            query_lens=query_lens,
            context_lens=step.ends,
            num_single=singles,
            groups=tuple(groups),
            logits_rows=self._put(logits_rows),
            query_starts=self._put(torch.nn.functional.pad(query_ends, (1, 0)).int()),
            seen=self._put(seen),
        )
        return batch, sampling_rows, next_positions

    def _put(self, values: torch.Tensor) -> torch.Tensor:
        return put(values, self.device)


def _tensor(values: Iterable[int]) -> torch.Tensor:
    """As torch.tensor(values), which takes eight times as long."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)
