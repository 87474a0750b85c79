"""The decoder of every family; differences between families are in the config."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from model.attention import Attention
from model.config import LayerConfig, ModelConfig
from model.latent_attention import LatentAttention
from model.mlp import Mlp, Moe
from model.ops.specs import Linear, Norm, Parameter, RopeArgs
from model.ops.step_parts import EMBEDDING, FINAL_NORM, LM_HEAD
from model.sharding import ALONE, Shard

if TYPE_CHECKING:
    import torch

    from model.ops.backend import Backend
    from model.ops.forward_batch import ForwardBatch


def attention_of(
    config: ModelConfig, layer: LayerConfig, shard: Shard = ALONE
) -> Attention | LatentAttention:
    """Declare the attention of a layer."""
    return (Attention if config.latent is None else LatentAttention)(config, layer, shard)


class Layer:
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, shard: Shard = ALONE):
        self.rope_index = config.ropes.index(layer.rope or config.rope)
        self.attention = attention_of(config, layer, shard)
        self.mlp: Moe | Mlp = (Moe if layer.sparse else Mlp)(config, layer, shard)

    def parameters(self) -> Iterator[Parameter]:
        """Declare the norms, then the rest of the attention and of the MLP."""
        yield from self.attention.norm.parameters()
        yield from self.mlp.norm.parameters()
        yield from self.attention.parameters()
        yield from self.mlp.parameters()


class Transformer:
    """Token embedding, layers, final norm and head. `loader.load` fills the parameters.

    With a shard it is one rank's part of the model; ranks exchange results as they go. A model is
    declared without torch and without a backend; both are needed to load and to run it.
    """

    def __init__(self, config: ModelConfig, shard: Shard = ALONE):
        self.config, self.shard = config, shard
        self._tokens = shard.vocab_part(config.vocab_size)
        vocab, hidden = self._tokens.stop - self._tokens.start, config.hidden_size
        self.embedding_shape = (vocab, hidden)
        self.embedding: torch.Tensor | None = None
        self.layers = [Layer(config, layer, shard) for layer in config.layers]
        self.final_norm = Norm(hidden, config.norm)
        self.head = Linear(hidden, vocab, False, config.head_format)
        # For each of config.ropes: float32 [rows, rotary_dim].
        self.rope_tables: list[torch.Tensor] = []
        self.query_scales: torch.Tensor | None = None  # float32 [rows, 1]

    def parameters(self) -> Iterator[Parameter]:
        """Declare every parameter of this rank; a head tied to the embedding is not one.

        The order decides the values of dummy weights, so a new parameter belongs at the end.
        """
        yield Parameter(self, "embedding", self.embedding_shape)
        yield from self.final_norm.parameters()
        if not self.config.tie_word_embeddings:
            yield from self.head.parameters()
        for layer in self.layers:
            yield from layer.parameters()

    def prepare_rope(self, positions: int, device: "torch.device") -> None:
        """Tabulate cos and sin for positions up to (not including) `positions`."""
        from model.rope import query_scales, rope_table

        self.rope_tables = [
            rope_table(rope, self.config.rotary_dim, positions).to(device)
            for rope in self.config.ropes
        ]
        if self.config.rope.query_beta:
            self.query_scales = query_scales(self.config.rope, positions).to(device)

    def __call__(
        self,
        ops: "Backend",
        batch: "ForwardBatch",
        caches: "Sequence[torch.Tensor]",
        layer_caches: Sequence[tuple[int, int]],
        out: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """Logits float32 [rows, vocab] of `batch.logits_rows`; vocab is this rank's part.

        The residual stream and the logits are float32 in every compute dtype: rounding them would
        change more choices of tokens than rounding everything else does.

        caches: KV tensors as from `Backend.empty_cache`, written in place.
        layer_caches: for each layer, the index of its group in the batch and of its KV tensor.
        out: takes the logits, if it is given.
        """
        assert self.embedding is not None
        with EMBEDDING:
            x = self.shard.sum(
                ops.embed(
                    self.embedding,
                    batch.token_ids,
                    self.config.embedding_scale,
                    self._tokens.start,
                )
            )
        cos_sin = [ops.gather(table, batch.positions) for table in self.rope_tables]
        query_scale = self.query_scales
        if query_scale is not None:
            query_scale = ops.gather(query_scale, batch.positions)
        delta: torch.Tensor | None = None
        for layer, (group, cache) in zip(self.layers, layer_caches, strict=True):
            tables = batch.groups[group]
            attention = layer.attention
            rope = RopeArgs(
                attention.heads,
                cos_sin[layer.rope_index],
                caches[cache],
                tables.slot_mapping,
                query_scale,
            )
            x, delta = attention(ops, x, delta, rope, batch, tables)
            x, delta = layer.mlp(ops, x, delta)
        if len(batch.logits_rows) < len(x):
            x = ops.gather(x, batch.logits_rows)
            delta = None if delta is None else ops.gather(delta, batch.logits_rows)
        with FINAL_NORM:
            _, normed = ops.add_rms_norm(x, delta, self.final_norm)
        with LM_HEAD:
            logits = ops.logits(normed, self.head, self.config.logits_scale, out)
            return ops.softcap(logits, self.config.logits_softcap)
