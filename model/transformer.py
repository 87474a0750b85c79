"""The one decoder of every family: what differs between them is in the config."""

from collections.abc import Sequence

import torch

from model import ops
from model.attention import Attention
from model.config import LayerConfig, ModelConfig
from model.layers import Linear, Mlp, RMSNorm, declare
from model.moe import Moe
from model.ops.forward_batch import ForwardBatch
from model.rope import rope_table
from model.sharding import ALONE, Shard


class Layer:
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, shard: Shard = ALONE):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, shard)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: Moe | Mlp
        if layer.sparse:
            self.mlp = Moe(config, shard)
        else:
            self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.mlp_bias, shard)

    def feed_forward(
        self, x: torch.Tensor, delta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, delta [tokens, hidden] → (x + delta, the MLP of its norm)."""
        norm, mlp = self.mlp_norm, self.mlp
        if isinstance(mlp, Mlp) and mlp.down.shard.size == 1:  # ranks add up what down gives
            up, down = mlp.gate_up, mlp.down
            fused = ops.norm_mlp(
                x, delta, norm.weight, norm.eps, up.weight, up.bias, down.weight, down.bias
            )
            if fused is not None:
                return fused
        x, normed = norm(x, delta)
        return x, mlp(normed)


class Transformer:
    """Token embedding, layers, final norm and head. Weights come from `weights.load`.

    With a shard, what one rank has of them; ranks exchange results as they go.
    """

    def __init__(self, config: ModelConfig, shard: Shard = ALONE):
        self.config, self.shard = config, shard
        self._tokens = shard.vocab_part(config.vocab_size)
        vocab = self._tokens.stop - self._tokens.start
        self.embedding = declare(vocab, config.hidden_size)
        self.layers = [Layer(config, layer, shard) for layer in config.layers]
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, vocab, bias=False)
        self.rope = torch.empty(0)  # float32 [positions, head_dim], see prepare_rope

    def prepare_rope(self, positions: int, device: torch.device) -> None:
        """Tabulate cos and sin for positions up to (not including) `positions`."""
        self.rope = rope_table(self.config.rope, self.config.head_dim, positions).to(device)

    def __call__(
        self,
        batch: ForwardBatch,
        caches: Sequence[torch.Tensor],
        places: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """Logits [rows, vocab] of the rows the batch asks for; vocab is this rank's part of it.

        caches: KV tensors [2, blocks, block_size, kv_heads, head_dim], written in place.
        places: for each layer, which group's tables and which cache are its own.
        """
        x = self._embed(batch.token_ids)
        cos_sin = ops.gather(self.rope, batch.positions)
        delta: torch.Tensor | None = None
        for layer, (group, cache) in zip(self.layers, places, strict=True):
            kv, tables = caches[cache], batch.groups[group]
            x, query = layer.attention.project(
                layer.attention_norm, x, delta, cos_sin, kv, tables.slots
            )
            delta = layer.attention(query, kv, batch, tables)
            x, delta = layer.feed_forward(x, delta)
        if len(batch.logits_rows) < len(x):
            x = ops.gather(x, batch.logits_rows)
            delta = None if delta is None else ops.gather(delta, batch.logits_rows)
        _, normed = self.final_norm(x, delta)
        return self.head(normed)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.shard.size == 1:
            return ops.gather(self.embedding, token_ids)
        own = token_ids - self._tokens.start
        elsewhere = (own < 0) | (own >= len(self.embedding))
        x = self.embedding[own.masked_fill(elsewhere, 0)]
        return self.shard.sum(x.masked_fill_(elsewhere.unsqueeze(1), 0))
