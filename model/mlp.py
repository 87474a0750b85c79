"""The MLP of a layer: dense, or a sparse mixture of experts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from model.config import LayerConfig, ModelConfig, MoeConfig
from model.formats import DENSE
from model.ops.specs import (
    Experts,
    ExpertShard,
    Linear,
    Norm,
    Parameter,
    Router,
    SharedExpert,
)
from model.ops.step_parts import GATE_UP_PROJ, POST_NORM
from model.sharding import ALONE, Shard

if TYPE_CHECKING:
    import torch

    from model.ops.backend import Backend


class Mlp:
    """Dense gated MLP; gate and up are one linear, gate rows first. Split by its inner size."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, shard: Shard = ALONE):
        hidden, size = config.hidden_size, config.intermediate_size // shard.size
        self.shard, self.residual_scale = shard, config.residual_scale
        self.activation = config.activation
        self.norm = Norm(hidden, config.norm, is_identity=not config.pre_norms)
        self.post_norm = Norm(hidden, config.norm) if config.post_norms else None
        bias, forms = config.mlp_bias, layer.formats
        self.gate_up = Linear(hidden, 2 * size, bias, forms.gate_up)
        self.down = Linear(size, hidden, bias, forms.down, sum_over_ranks=True)

    def __call__(
        self, ops: "Backend", x: "torch.Tensor", delta: "torch.Tensor"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """x, delta [tokens, hidden] → (x + delta, MLP of its norm), both [tokens, hidden]."""
        with GATE_UP_PROJ:
            x, out = ops.norm_mlp(x, delta, self.norm, self.gate_up, self.down, self.activation)
        out = self.shard.sum(out)
        if self.post_norm is not None:
            with POST_NORM:
                out = ops.rms_norm(out, self.post_norm)
        return x, ops.scale(out, self.residual_scale)

    def parameters(self) -> Iterator[Parameter]:
        """Declare the linears and the norm after them."""
        for holder in (self.gate_up, self.down, self.post_norm):
            if holder is not None:
                yield from holder.parameters()


class Moe:
    """The weighted sum of top_k experts for each token, and the expert that all share, if any.

    Experts are distributed whole over the ranks, a shared expert by its inner size, and every rank
    has the router.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, shard: Shard = ALONE):
        moe = config.moe
        if moe is None:
            raise ValueError("the model has no experts")
        self.shard, self.expert_shard = shard, ExpertShard(shard.rank, shard.size)
        self.residual_scale = config.residual_scale
        self.activation = config.activation
        self.router_spec = moe.router
        self.norm = Norm(config.hidden_size, config.norm)
        self.router = Linear(config.hidden_size, moe.num_experts, moe.biases, DENSE)
        self.correction: torch.Tensor | None = None
        self.experts = Experts(
            moe.num_experts // shard.size,
            config.hidden_size,
            moe.intermediate_size,
            moe.biases,
            layer.formats.experts,
            shared=_shared_expert(config.hidden_size, moe, layer, shard),
        )

    def __call__(
        self, ops: "Backend", x: "torch.Tensor", delta: "torch.Tensor"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """x, delta [tokens, hidden] → (x + delta, experts of its norm).

        The experts' sum is [tokens, hidden], or its parts as in `Backend.norm_experts`.
        """
        with GATE_UP_PROJ:
            x, out = ops.norm_experts(
                x,
                delta,
                self.norm,
                Router(self.router, self.router_spec, self.correction),
                self.experts,
                self.activation,
                self.expert_shard,
            )
        return x, ops.scale(self.shard.sum(out), self.residual_scale)

    def parameters(self) -> Iterator[Parameter]:
        """Declare the router and the experts."""
        shared = self.experts.shared
        yield from self.router.parameters()
        yield from self.experts.parameters()
        if self.router_spec.has_correction:
            yield Parameter(self, "correction", (self.router.outputs,), is_float32=True)
        if shared is not None:
            for linear in (shared.gate_up, shared.down, shared.gate):
                if linear is not None:
                    yield from linear.parameters()


def _shared_expert(
    hidden: int, moe: MoeConfig, layer: LayerConfig, shard: Shard
) -> SharedExpert | None:
    if not moe.shared_size:
        return None
    size, forms = moe.shared_size // shard.size, layer.formats
    return SharedExpert(
        Linear(hidden, 2 * size, False, forms.gate_up),
        Linear(size, hidden, False, forms.down, sum_over_ranks=True),
        Linear(hidden, 1, False, DENSE) if moe.shared_gate else None,
    )
