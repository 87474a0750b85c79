"""The one decoder of every family: what differs between them is in the config."""

from collections.abc import Sequence

import torch

from model import ops
from model.attention import Attention
from model.batch import ForwardBatch
from model.config import LayerConfig, ModelConfig
from model.layers import Linear, Mlp, RMSNorm, declare
from model.moe import Moe
from model.rope import rope_table


class Layer:
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: LayerConfig):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: Moe | Mlp
        if layer.sparse:
            self.mlp = Moe(config)
        else:
            self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def project(
        self, x: torch.Tensor, delta: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, delta [tokens, hidden] → (x + delta, QKV of its norm)."""
        norm, qkv = self.attention_norm, self.attention.qkv
        fused = ops.norm_qkv(x, delta, norm.weight, norm.eps, qkv.weight, qkv.bias)
        if fused is not None:
            return fused
        x, normed = norm(x, delta)
        return x, qkv(normed)

    def feed_forward(
        self, x: torch.Tensor, delta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, delta [tokens, hidden] → (x + delta, the MLP of its norm)."""
        norm, mlp = self.mlp_norm, self.mlp
        if isinstance(mlp, Mlp):
            up, down = mlp.gate_up, mlp.down
            fused = ops.norm_mlp(
                x, delta, norm.weight, norm.eps, up.weight, up.bias, down.weight, down.bias
            )
            if fused is not None:
                return fused
        x, normed = norm(x, delta)
        return x, mlp(normed)


class Transformer:
    """Token embedding, layers, final norm and head. Weights come from `weights.load`."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.embedding = declare(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, layer) for layer in config.layers]
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
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
        """Logits [rows, vocab] of the rows the batch asks for.

        caches: KV tensors [2, blocks, block_size, kv_heads, head_dim], written in place.
        places: for each layer, which group's tables and which cache are its own.
        """
        x = ops.gather(self.embedding, batch.token_ids)
        cos_sin = ops.gather(self.rope, batch.positions)
        delta: torch.Tensor | None = None
        for layer, (group, cache) in zip(self.layers, places, strict=True):
            x, qkv = layer.project(x, delta)
            delta = layer.attention(qkv, cos_sin, caches[cache], batch, batch.groups[group])
            x, delta = layer.feed_forward(x, delta)
        if len(batch.logits_rows) < len(x):
            x = ops.gather(x, batch.logits_rows)
            delta = None if delta is None else ops.gather(delta, batch.logits_rows)
        _, normed = self.final_norm(x, delta)
        return self.head(normed)
