"""A recurrent layer: norm, projections, convolution, gated delta rule, gated norm, output."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from model.config import LayerConfig, ModelConfig
from model.formats import DENSE
from model.ops.specs import DeltaRuleGates, LayerState, Linear, Norm, NormSpec, Parameter
from model.ops.step_parts import ATTENTION, INPUT_NORM, O_PROJ, QKV_PROJ
from model.sharding import ALONE, Shard

if TYPE_CHECKING:
    import torch

    from model.ops.backend import Backend
    from model.ops.forward_batch import ForwardBatch


class DeltaRule:
    """Gated DeltaNet, in the place of attention: a state of one size for any number of tokens.

    Split by head: each rank has a part of the key heads with their value heads.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, shard: Shard = ALONE):
        if config.delta_rule is None:
            raise ValueError("the model has no recurrent layers")
        hidden, forms = config.hidden_size, layer.formats
        self.shard, self.residual_scale = shard, config.residual_scale
        self.spec = spec = config.delta_rule.part(shard.size)
        width = spec.value_heads * spec.value_dim
        self.norm = Norm(hidden, config.norm)
        # The rows of queries, keys and values, then those of the gate of the output.
        self.qkv_gate = Linear(hidden, spec.channels + width, False, forms.qkv)
        self.gates_in = Linear(hidden, 2 * spec.value_heads, False, DENSE)
        self.conv: torch.Tensor | None = None  # float32 [kernel, channels], the newest token last
        self.gates = DeltaRuleGates(spec)
        self.head_norm = Norm(spec.value_dim, NormSpec(config.norm.eps))
        self.out = Linear(width, hidden, False, forms.out, sum_over_ranks=True)

    def __call__(
        self,
        ops: "Backend",
        x: "torch.Tensor",
        delta: "torch.Tensor | None",
        state: LayerState,
        batch: "ForwardBatch",
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """x, delta [tokens, hidden] → (x + delta, the layer of its norm), both [tokens, hidden].

        The states of the batch's sequences are replaced by those after their new tokens.
        """
        assert self.conv is not None
        with INPUT_NORM:
            x, normed = ops.add_rms_norm(x, delta, self.norm)
        with QKV_PROJ:
            projected = ops.linear(normed, self.qkv_gate)
            gates = ops.linear(normed, self.gates_in)
        with ATTENTION:
            mixed = ops.causal_conv(projected, self.conv, state.conv, batch)
            out = ops.delta_rule(mixed, gates, self.gates, state.recurrent, batch)
            out = ops.gated_norm(out, projected[:, self.spec.channels :], self.head_norm)
        with O_PROJ:
            out = ops.linear(out, self.out)
        return x, ops.scale(self.shard.sum(out), self.residual_scale)

    def parameters(self) -> Iterator[Parameter]:
        """Declare the linears, the convolution, the gates and the norm of heads."""
        for holder in (self.qkv_gate, self.gates_in, self.out):
            yield from holder.parameters()
        yield Parameter(self, "conv", (self.spec.kernel, self.spec.channels), is_float32=True)
        yield from self.gates.parameters()
        yield from self.head_norm.parameters()
