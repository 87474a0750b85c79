"""A step's chunks → ForwardBatch → logits → next tokens. Owns the model and the KV tensors."""

import itertools
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch

from engine.kv_cache import NULL_BLOCK, LayerGroup, group_layers
from engine.request import TokenLogprobs
from engine.sampler import sample
from engine.scheduler import Chunk
from model import ModelConfig, Transformer, weights
from model.batch import ForwardBatch, GroupTables


class ModelRunner:
    """The model on its device. Holds no state of requests but what is in the KV tensors."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.groups: list[LayerGroup] = group_layers([layer.window for layer in config.layers])
        self._places = [(0, 0)] * len(config.layers)
        for g, group in enumerate(self.groups):
            for i, layer in enumerate(group.layers):
                self._places[layer] = (g, i)
        self._model: Transformer | None = None
        self._caches: list[torch.Tensor] = []
        self._block_size = 0

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

    def allocate(self, num_blocks: int, block_size: int, max_positions: int) -> None:
        """Allocate the KV tensors and the rotary table."""
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

    def free(self) -> None:
        """Drop weights and KV."""
        self._model = None
        self._caches = []

    @torch.inference_mode()
    def run(self, chunks: SequenceOf[Chunk]) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Compute the chunks; the next token (and logprobs) of each chunk that samples."""
        if self._model is None:
            raise RuntimeError("the engine is not warmed up")
        logits = self._model(self._batch(chunks), self._caches, self._places)
        sequences = [chunk.sequence for chunk in chunks if chunk.samples]
        return sample(
            logits,
            [sequence.request.params for sequence in sequences],
            [len(sequence.tokens) for sequence in sequences],
        )

    def _batch(self, chunks: SequenceOf[Chunk]) -> ForwardBatch:
        query_lens = [chunk.end - chunk.start for chunk in chunks]
        ends = list(itertools.accumulate(query_lens))
        token_ids: list[int] = []
        for chunk in chunks:
            token_ids += chunk.sequence.tokens[chunk.start : chunk.end]
        singles = sum(length == 1 for length in query_lens)
        positions = torch.tensor([chunk.start for chunk in chunks[:singles]], dtype=torch.int64)
        if singles < len(chunks):
            ranges = [torch.arange(chunk.start, chunk.end) for chunk in chunks[singles:]]
            positions = torch.cat((positions, *ranges))
        rows = torch.repeat_interleave(torch.tensor(query_lens))
        blocks, offsets = positions // self._block_size, positions % self._block_size
        groups = []
        for g, group in enumerate(self.groups):
            tables = [chunk.sequence.tables.tables[g] for chunk in chunks]
            width = max(map(len, tables))
            padded = b"".join(table.tobytes() + bytes(8 * (width - len(table))) for table in tables)
            table = torch.frombuffer(bytearray(padded), dtype=torch.int64).view(-1, width)
            slots = table[rows, blocks] * self._block_size + offsets
            table = table.int()
            groups.append(GroupTables(group.window, table.to(self.device), slots.to(self.device)))
        return ForwardBatch(
            token_ids=torch.tensor(token_ids, device=self.device),
            positions=positions.to(self.device),
            query_lens=query_lens,
            context_lens=[chunk.end for chunk in chunks],
            num_single=singles,
            groups=tuple(groups),
            logits_rows=torch.tensor(
                [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.samples],
                dtype=torch.int64,
                device=self.device,
            ),
            query_starts=torch.tensor([0, *ends], dtype=torch.int32, device=self.device),
            seen=torch.tensor(
                [chunk.end for chunk in chunks], dtype=torch.int32, device=self.device
            ),
        )
