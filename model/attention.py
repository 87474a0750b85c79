"""Self-attention of one layer: norm, QKV, rotary, paged KV write, attention, output."""

import torch

from model import ops
from model.config import ModelConfig
from model.layers import Linear, RMSNorm, RowLinear, declare
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.sharding import ALONE, Shard


class Attention:
    """Grouped-query attention with what the family adds: biases, QK norms, sinks, a window.

    Heads are those of this rank.
    """

    def __init__(self, config: ModelConfig, shard: Shard = ALONE):
        self.heads = config.num_heads // shard.size
        self.kv_heads = max(1, config.num_kv_heads // shard.size)
        self.head_dim = config.head_dim
        width = self.heads * self.head_dim
        qkv_width = width + 2 * self.kv_heads * self.head_dim
        self.qkv = Linear(config.hidden_size, qkv_width, config.qkv_bias)
        self.out = RowLinear(width, config.hidden_size, config.o_bias, shard)
        self.q_norm = declare(self.head_dim) if config.qk_norm else None
        self.k_norm = declare(self.head_dim) if config.qk_norm else None
        self.sinks = declare(self.heads) if config.sinks else None

    def project(
        self,
        norm: RMSNorm,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        cos_sin: torch.Tensor,
        kv: torch.Tensor,
        slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, delta [tokens, hidden] → (x + delta, query of its norm); keys and values go to kv.

        cos_sin, kv, slots and the query [tokens, heads, head_dim] are as in ops.rotate_and_write.
        """
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm, self.k_norm
        turn = cos_sin, kv, slots, self.heads, norms
        qkv = self.qkv
        fused = ops.norm_qkv(x, delta, norm.weight, norm.eps, qkv.weight, qkv.bias, *turn)
        if fused is not None:
            return fused
        x, normed = norm(x, delta)
        heads = qkv(normed).unflatten(-1, (-1, self.head_dim))
        return x, ops.rotate_and_write(heads, *turn, norm.eps)

    def __call__(
        self, query: torch.Tensor, kv: torch.Tensor, batch: ForwardBatch, group: GroupTables
    ) -> torch.Tensor:
        """Attention and the output's projection; arguments of ops.attention → [tokens, hidden]."""
        mixed = ops.attention(query, kv, batch, group, self.sinks)
        return self.out(mixed.flatten(1))
