"""Self-attention of one layer: QKV projection, rotary, paged KV write, attention, output."""

import torch

from model import ops
from model.batch import ForwardBatch, GroupTables
from model.config import ModelConfig
from model.layers import Linear, RMSNorm, declare


class Attention:
    """Grouped-query attention with what the family adds: biases, QK norms, sinks, a window."""

    def __init__(self, config: ModelConfig):
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        width = self.heads * self.head_dim
        qkv_width = width + 2 * self.kv_heads * self.head_dim
        self.qkv = Linear(config.hidden_size, qkv_width, config.qkv_bias)
        self.out = Linear(width, config.hidden_size, config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.sinks = declare(self.heads) if config.sinks else None

    def __call__(
        self,
        x: torch.Tensor,
        cos_sin: torch.Tensor,
        kv: torch.Tensor,
        batch: ForwardBatch,
        group: GroupTables,
    ) -> torch.Tensor:
        """x [tokens, hidden], cos_sin [tokens, head_dim], kv as in ops.attention → as x."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        turned, value = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = turned.split((self.heads, self.kv_heads), dim=1)
            turned = torch.cat((self.q_norm(query), self.k_norm(key)), dim=1)
        query, key = ops.rotate(turned, cos_sin).split((self.heads, self.kv_heads), dim=1)
        ops.write_kv(kv, group.slots, key, value)
        mixed = ops.attention(query, kv, batch, group, self.sinks)
        return self.out(mixed.flatten(1))
