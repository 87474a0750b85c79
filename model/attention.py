"""Self-attention of one layer: QKV projection, rotary, paged KV write, attention, output."""

import torch

from model import ops
from model.batch import ForwardBatch, GroupTables
from model.config import ModelConfig
from model.layers import Linear, RowLinear, declare
from model.shard import ALONE, Shard


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
        self.eps = config.rms_norm_eps
        self.q_norm = declare(self.head_dim) if config.qk_norm else None
        self.k_norm = declare(self.head_dim) if config.qk_norm else None
        self.sinks = declare(self.heads) if config.sinks else None

    def __call__(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        kv: torch.Tensor,
        batch: ForwardBatch,
        group: GroupTables,
    ) -> torch.Tensor:
        """Rotary, KV write, attention and the output's projection.

        qkv [tokens, (heads + 2 · kv_heads) · head_dim] from `self.qkv`, the rest as in
        ops.rotate_and_write and ops.attention → [tokens, hidden].
        """
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm, self.k_norm
        query = ops.rotate_and_write(qkv, cos_sin, kv, group.slots, self.heads, norms, self.eps)
        mixed = ops.attention(query, kv, batch, group, self.sinks)
        return self.out(mixed.flatten(1))
