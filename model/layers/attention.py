"""Self-attention of one layer: norm, QKV, rotary, paged KV write, attention, output."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from model.config import LayerConfig, ModelConfig
from model.ops.specs import AttentionSpec, Heads, Linear, Norm, Parameter, RopeArgs
from model.ops.step_parts import ATTENTION, INPUT_NORM, O_PROJ, POST_NORM, QKV_PROJ, ROPE
from model.sharding import ALONE, Shard

if TYPE_CHECKING:
    import torch

    from model.ops.backend import Backend
    from model.ops.forward_batch import ForwardBatch, GroupTables


class Attention:
    """Grouped-query attention; a family may add biases, norms of heads, sinks and a window.

    Split by head: each rank has a part of the heads.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, shard: Shard = ALONE):
        hidden, sizes, spec = config.hidden_size, config.heads(layer), config.norm
        heads, head_dim = config.num_heads // shard.size, sizes.head_dim
        has_kv = layer.kv_source is None
        kv_heads = max(1, sizes.num_kv_heads // shard.size) if has_kv else 0
        norms: tuple[Norm | None, Norm | None] = (None, None)
        if config.qk_norm:
            whole = config.whole_qk_norm
            widths = (heads * head_dim, kv_heads * head_dim) if whole else (head_dim, head_dim)
            norms = Norm(widths[0], spec), Norm(widths[1], spec) if has_kv else None
        self.shard, self.residual_scale = shard, config.residual_scale
        self.norm = Norm(hidden, spec, is_identity=not config.pre_norms)
        self.post_norm = Norm(hidden, spec) if config.post_norms else None
        self.heads = Heads(
            heads,
            kv_heads,
            head_dim,
            *norms,
            config.rotates_before_qk_norm,
            config.value_norm,
            sizes.values_are_keys,
        )
        self.spec = AttentionSpec(
            config.attention_scale or head_dim**-0.5, layer.window, config.attention_softcap
        )
        self.has_sinks = config.sinks
        self.sinks: torch.Tensor | None = None
        forms, qkv_width = layer.formats, sum(self.heads.parts) * head_dim
        self.qkv = Linear(hidden, qkv_width, config.qkv_bias, forms.qkv)
        self.gate = (
            Linear(hidden, heads * head_dim, config.qkv_bias, forms.qkv)
            if config.output_gate
            else None
        )
        self.out = Linear(heads * head_dim, hidden, config.o_bias, forms.out, sum_over_ranks=True)

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

        Keys and values of the new tokens are written to rope.kv.
        """
        x, query, gate = self.project_and_write(ops, x, delta, rope)
        with ATTENTION:
            mixed = ops.attention(query, rope.kv, batch, group, self.spec, self.sinks).flatten(1)
            if gate is not None:
                mixed = ops.output_gate(mixed, gate)
        with O_PROJ:
            out = ops.linear(mixed, self.out)
        out = self.shard.sum(out)
        if self.post_norm is not None:
            with POST_NORM:
                out = ops.rms_norm(out, self.post_norm)
        return x, ops.scale(out, self.residual_scale)

    def project_and_write(
        self, ops: "Backend", x: "torch.Tensor", delta: "torch.Tensor | None", rope: RopeArgs
    ) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]":
        """As `Backend.norm_qkv`, and the output's gate from the same norm, if there is one."""
        if self.gate is None:
            with QKV_PROJ:
                return *ops.norm_qkv(x, delta, self.norm, self.qkv, rope), None
        with INPUT_NORM:
            x, normed = ops.add_rms_norm(x, delta, self.norm)
        with QKV_PROJ:
            qkv = ops.linear(normed, self.qkv).unflatten(-1, (-1, self.heads.head_dim))
            gate = ops.linear(normed, self.gate)
        with ROPE:
            return x, ops.rotate_and_write(qkv, rope), gate

    def parameters(self) -> Iterator[Parameter]:
        """Declare the linears, the norms of heads and the sinks."""
        norms = self.heads.q_norm, self.heads.k_norm, self.post_norm
        for holder in (self.qkv, self.out, *norms, self.gate):
            if holder is not None:
                yield from holder.parameters()
        if self.has_sinks:
            yield Parameter(self, "sinks", (self.heads.heads,))
