"""The decoder of every family; differences between families are in the config."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from model.config import LayerConfig, ModelConfig
from model.layers.attention import Attention
from model.layers.delta_rule import DeltaRule
from model.layers.latent_attention import LatentAttention
from model.layers.mlp import PerLayerInputs, PerLayerMlp, make_mlp
from model.ops.specs import LayerState, Linear, Norm, Parameter, RopeArgs
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
    """Attention, or a recurrence in its place, and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, shard: Shard = ALONE):
        self.rope_index = config.ropes.index(config.rope_of(layer))
        self.attention: Attention | LatentAttention | DeltaRule = (
            DeltaRule if layer.recurrent else attention_of
        )(config, layer, shard)
        self.mlp = make_mlp(config, layer, shard)
        self.per_layer = PerLayerMlp(config) if config.per_layer_size else None
        self.has_scalar = config.layer_scalars
        self.scalar: torch.Tensor | None = None  # float32 [1]

    def parameters(self) -> Iterator[Parameter]:
        """Declare the norms, then the rest of the attention and of the MLP."""
        yield from self.attention.norm.parameters()
        yield from self.mlp.norm.parameters()
        yield from self.attention.parameters()
        yield from self.mlp.parameters()
        if self.per_layer is not None:
            yield from self.per_layer.parameters()
        if self.has_scalar:
            yield Parameter(self, "scalar", (1,), is_float32=True)


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
        self.per_layer = PerLayerInputs(config, shard) if config.per_layer_size else None
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
        if self.per_layer is not None:
            yield from self.per_layer.parameters()

    def prepare_rope(self, positions: int, device: "torch.device") -> None:
        """Tabulate cos and sin for positions up to (not including) `positions`."""
        from model.rope import query_scales, rope_table

        self.rope_tables = [
            rope_table(rope, rotary_dim, positions).to(device)
            for rope, rotary_dim in self.config.ropes
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
        states: Sequence[LayerState] = (),
    ) -> "torch.Tensor":
        """Logits float32 [rows, vocab] of `batch.logits_rows`; out: takes them, if it is given.

        The rest is as in `hidden`.
        """
        x, delta = self.hidden(ops, batch, caches, layer_caches, states, batch.logits_rows)
        return self.logits(ops, x, delta, out=out)

    def hidden(
        self,
        ops: "Backend",
        batch: "ForwardBatch",
        caches: "Sequence[torch.Tensor]",
        layer_caches: Sequence[tuple[int, int]],
        states: Sequence[LayerState] = (),
        rows: "torch.Tensor | None" = None,
    ) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """The residual stream after the layers [rows, hidden], and what is still added to it.

        rows: int64, the tokens of the batch that it is computed for, in order; None: all of them.
        Of the last layer, the other tokens only need their keys and values.

        The residual stream and the logits are float32 in every compute dtype: rounding them would
        change more choices of tokens than rounding everything else does.

        caches: KV tensors as from `Backend.empty_cache`, written in place. Blocks may have any
        distance from each other.
        layer_caches: for each layer, the index of its group in the batch and of its KV tensor.
        states: those of the recurrent layers, in order; layer_caches is not read for these layers.
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
        own = None if self.per_layer is None else self.per_layer(ops, x, batch.token_ids)
        next_state = iter(states)
        for i, (layer, (group, cache)) in enumerate(zip(self.layers, layer_caches, strict=True)):
            attention = layer.attention
            is_last = i + 1 == len(self.layers)
            only_writes = is_last and rows is not None and not len(rows)
            if isinstance(attention, DeltaRule):
                x, delta = attention(ops, x, delta, next(next_state), batch)
            else:
                tables = batch.groups[group]
                rope = RopeArgs(
                    attention.heads,
                    cos_sin[layer.rope_index],
                    caches[cache],
                    tables.slot_mapping,
                    query_scale,
                )
                if only_writes:
                    attention.project_and_write(ops, x, delta, rope)
                    return x[:0], None
                x, delta = attention(ops, x, delta, rope, batch, tables)
            if only_writes:
                return x[:0], None
            inputs = None if own is None else own[:, i]
            if is_last and rows is not None and len(rows) < len(x):
                x, delta = ops.gather(x, rows), ops.gather(delta, rows)
                inputs = None if inputs is None else ops.gather(inputs, rows)
            x, delta = layer.mlp(ops, x, delta)
            if layer.per_layer is not None and inputs is not None:
                x, delta = layer.per_layer(ops, x, delta, inputs)
            if layer.scalar is not None:
                x, delta = ops.scaled_sum(x, delta, layer.scalar), None
        return x, delta

    def logits(
        self,
        ops: "Backend",
        x: "torch.Tensor",
        delta: "torch.Tensor | None",
        rows: "torch.Tensor | None" = None,
        out: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """Logits float32 [rows, vocab] of these rows of `hidden`, or of all of them.

        vocab is this rank's part.
        """
        if rows is not None:
            x = ops.gather(x, rows)
            delta = None if delta is None else ops.gather(delta, rows)
        with FINAL_NORM:
            _, normed = ops.add_rms_norm(x, delta, self.final_norm)
        with LM_HEAD:
            logits = ops.logits(normed, self.head, self.config.logits_scale, out)
            return ops.softcap(logits, self.config.logits_softcap)
