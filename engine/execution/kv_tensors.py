"""The keys and values of a rank's layers: which layers share KV blocks, and their memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.scheduling.kv_cache import KvKind, LayerGroup, group_layers
from model import ModelConfig
from model.ops.backend import Backend
from model.ops.kv_values import vector_width


class _Place(NamedTuple):
    """Where a layer's keys and values are: a part of the blocks of a KV tensor."""

    tensor: int
    part: int
    parts: int
    heads: tuple[int, int]  # KV heads on this rank, head_dim


@dataclass(frozen=True)
class KvLayout:
    """The layers' places in the blocks of the KV cache."""

    groups: list[LayerGroup]
    heads: list[tuple[int, int]]  # of each layer: KV heads on this rank, head_dim
    sources: list[int]  # of each layer: whose keys and values it attends to, usually its own
    dtype: torch.dtype
    vectors: int = 2  # of a position and head: key and value, or a latent that is both

    @classmethod
    def of(cls, config: ModelConfig, ranks: int, dtype: torch.dtype) -> "KvLayout":
        """The layout of one rank; dtype: of the KV cache."""
        sizes = [config.heads(layer) for layer in config.layers]
        heads = [(max(1, own.num_kv_heads // ranks), own.head_dim) for own in sizes]
        kinds: list[KvKind | None] = []
        for layer, own in zip(config.layers, heads, strict=True):
            kind = KvKind(layer.window, own[0] * vector_width(dtype, own[1]))
            has_kv = layer.kv_source is None and not layer.recurrent
            kinds.append(kind if has_kv else None)
        given = [layer.kv_source for layer in config.layers]
        sources = [i if source is None else source for i, source in enumerate(given)]
        return cls(group_layers(kinds), heads, sources, dtype, config.kv_vectors)

    @property
    def _tensors(self) -> int:
        return max(group.tensors for group in self.groups)

    @property
    def _widest(self) -> tuple[int, int]:
        heads = (self.heads[layer] for group in self.groups for layer in group.layers)
        return max(heads, key=self._width)

    def _width(self, heads: tuple[int, int]) -> int:
        """Elements of a position's keys."""
        return heads[0] * vector_width(self.dtype, heads[1])

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one KV block over all layers of a group."""
        positions = self.vectors * self._tensors * block_size
        return positions * self._width(self._widest) * self.dtype.itemsize

    def _places(self) -> Iterator[tuple[int, int, _Place]]:
        """(layer, its group, its place), for layers with keys and values of their own."""
        for g, group in enumerate(self.groups):
            for i, layer in enumerate(group.layers):
                place = _Place(i // group.parts, i % group.parts, group.parts, self.heads[layer])
                yield layer, g, place

    @property
    def layer_caches(self) -> list[tuple[int, int]]:
        """For each layer its group, and its place among the tensors of `allocate`.

        Recurrent layers have neither; theirs are 0.
        """
        places = list(dict.fromkeys(place for _, _, place in self._places()))
        own = {layer: (g, places.index(place)) for layer, g, place in self._places()}
        return [own.get(source, (0, 0)) for source in self.sources]

    def allocate(self, backend: Backend, blocks: int, block_size: int) -> list[torch.Tensor]:
        """The KV tensors [2, blocks, block_size, kv_heads, …], as `Backend.empty_cache`'s.

        Those of layers with smaller keys than others are parts of larger blocks.
        """
        shape = (self.vectors, blocks, block_size, *self._widest)
        whole = [backend.empty_cache(shape) for _ in range(self._tensors)]
        found = []
        for tensor, part, parts, heads in dict.fromkeys(place for _, _, place in self._places()):
            if heads == self._widest:
                found.append(whole[tensor])
                continue
            first = part * (self._width(self._widest) // parts) * block_size
            own = (block_size, heads[0], vector_width(self.dtype, heads[1]))
            values = whole[tensor].flatten(2).narrow(2, first, block_size * self._width(heads))
            found.append(values.unflatten(2, own))
        return found
