"""Multi-head latent attention of one layer: projections to latents, attention, output.

Source: DeepSeek-V2 (2024), 2.1. Queries are multiplied by the keys' share of the projection from
latents to keys and values, and results by the values' share, so that attention reads the latents
themselves, in chunks as in single tokens. All query heads share them as one KV head.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from model.config import LayerConfig, ModelConfig
from model.formats import PER_HEAD
from model.ops.specs import AttentionSpec, HeadLinear, Heads, Linear, Norm, Parameter, RopeArgs
from model.ops.step_parts import ATTENTION, INPUT_NORM, O_PROJ, QKV_PROJ, ROPE
from model.sharding import ALONE, Shard

if TYPE_CHECKING:
    import torch

    from model.ops.backend import Backend
    from model.ops.forward_batch import ForwardBatch, GroupTables


class LatentAttention:
    """As `Attention`, with latents in the KV cache.

    Split by head; every rank has the projections to latents and the latents of all tokens.
    """

    has_sinks = False
    post_norm: Norm | None = None

    def __init__(self, config: ModelConfig, layer: LayerConfig, shard: Shard = ALONE):
        latent = config.latent
        if latent is None:
            raise ValueError("the model has no latents")
        hidden, heads, forms = config.hidden_size, config.num_heads // shard.size, layer.formats
        width = heads * (latent.plain_dim + config.rotary_dim)
        self.shard, self.residual_scale = shard, config.residual_scale
        self.norm = Norm(hidden, config.norm, is_identity=not config.pre_norms)
        self.heads = Heads(heads, config.num_kv_heads, config.head_dim)
        scale = config.attention_scale or (latent.plain_dim + config.rotary_dim) ** -0.5
        self.spec = AttentionSpec(scale, layer.window, config.attention_softcap, latent.rank)
        self.query_down: Linear | None = None
        self.query_norm: Norm | None = None
        if latent.query_rank is not None:
            self.query_down = Linear(hidden, latent.query_rank, latent.bias, forms.qkv)
            self.query_norm = Norm(latent.query_rank, latent.norm)
        self.query = Linear(latent.query_rank or hidden, width, False, forms.qkv)
        self.latent = Linear(hidden, config.head_dim, latent.bias, forms.qkv)
        self.latent_norm = Norm(latent.rank, latent.norm)
        self.absorb = HeadLinear(heads, latent.plain_dim, latent.rank, PER_HEAD)
        self.expand = HeadLinear(heads, latent.rank, latent.value_dim, PER_HEAD)
        self.out = Linear(
            heads * latent.value_dim, hidden, config.o_bias, forms.out, sum_over_ranks=True
        )

    def __call__(
        self,
        ops: "Backend",
        x: "torch.Tensor",
        delta: "torch.Tensor | None",
        rope: RopeArgs,
        batch: "ForwardBatch",
        group: "GroupTables",
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """x, delta [tokens, hidden] → (x + delta, attention of its norm), both [tokens, hidden].

        The latents of the new tokens are written to rope.kv.
        """
        x, query = self.project_and_write(ops, x, delta, rope)
        with ATTENTION:
            mixed = ops.attention(query, rope.kv, batch, group, self.spec)
        with O_PROJ:
            values = ops.head_linear(mixed, self.expand)
            out = self.shard.sum(ops.linear(values.flatten(1), self.out))
        return x, ops.scale(out, self.residual_scale)

    def project_and_write(
        self, ops: "Backend", x: "torch.Tensor", delta: "torch.Tensor | None", rope: RopeArgs
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """(x + delta, the query of its norm); the new tokens' latents are written to rope.kv."""
        with QKV_PROJ:
            with INPUT_NORM:
                x, normed = ops.add_rms_norm(x, delta, self.norm)
            source = normed
            if self.query_down is not None and self.query_norm is not None:
                source = ops.rms_norm(ops.linear(normed, self.query_down), self.query_norm)
            query = ops.linear(source, self.query).unflatten(-1, (self.heads.heads, -1))
            latent = ops.linear(normed, self.latent)
            with ROPE:
                return x, ops.latent_query(query, latent, self.latent_norm, self.absorb, rope)

    def parameters(self) -> Iterator[Parameter]:
        """Declare the linears and the norms of latents."""
        norms = self.query_norm, self.latent_norm
        linears = self.query_down, self.query, self.latent, self.out
        for holder in (*linears, self.absorb, self.expand, *norms):
            if holder is not None:
                yield from holder.parameters()
