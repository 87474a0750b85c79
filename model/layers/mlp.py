"""The MLP of a layer: dense, or a sparse mixture of experts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from model.config import LayerConfig, ModelConfig, MoeConfig
from model.formats import DENSE, HEAD
from model.ops.specs import (
    Experts,
    ExpertShard,
    Linear,
    Norm,
    NormSpec,
    Parameter,
    Router,
    SharedExpert,
)
from model.ops.step_parts import EMBEDDING, GATE_UP_PROJ, PER_LAYER_MLP, POST_NORM, ROUTER
from model.sharding import ALONE, Shard

if TYPE_CHECKING:
    import torch

    from model.ops.backend import Backend


class Mlp:
    """Dense MLP; gate, if any, and up are one linear, gate rows first. Split by its inner size."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, shard: Shard = ALONE):
        hidden, size = config.hidden_size, config.mlp_size(layer) // shard.size
        self.shard, self.residual_scale = shard, config.residual_scale
        self.activation = config.activation
        self.norm = Norm(hidden, config.norm, is_identity=not config.pre_norms)
        self.post_norm = Norm(hidden, config.norm) if config.post_norms else None
        bias, forms = config.mlp_bias, layer.formats
        self.gate_up = Linear(hidden, config.activation.parts * size, bias, forms.gate_up)
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
        self.router = Linear(config.hidden_size, moe.num_experts, moe.biases, HEAD)
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
        if self.router_spec.has_correction or self.router_spec.scales_experts:
            yield Parameter(self, "correction", (self.router.outputs,), is_float32=True)
        if shared is not None:
            for linear in (shared.gate_up, shared.down, shared.gate):
                if linear is not None:
                    yield from linear.parameters()


class MlpBesideExperts:
    """A dense MLP and experts, whose results are added; each part has a norm before and after it.

    The router has another norm than the experts. (Gemma 4.)
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, shard: Shard = ALONE):
        hidden, spec = config.hidden_size, config.norm
        self.mlp, self.moe = Mlp(config, layer, shard), Moe(config, layer, shard)
        self.norm = self.mlp.norm
        self.router_norm = Norm(hidden, spec, factor=hidden**-0.5)
        self.experts_post_norm, self.post_norm = Norm(hidden, spec), Norm(hidden, spec)

    def __call__(
        self, ops: "Backend", x: "torch.Tensor", delta: "torch.Tensor"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """x, delta [tokens, hidden] → (x + delta, the sum for it), both [tokens, hidden]."""
        moe = self.moe
        x, dense = self.mlp(ops, x, delta)
        with ROUTER:
            _, normed = ops.add_rms_norm(x, None, self.router_norm)
            logits = ops.logits(normed, moe.router, 1)
            chosen, weights = ops.route(logits, moe.router_spec, moe.correction)
        with GATE_UP_PROJ:
            _, normed = ops.add_rms_norm(x, None, moe.norm)
            sparse = ops.experts(
                normed, chosen, weights, moe.experts, moe.activation, moe.expert_shard
            )
        sparse = moe.shard.sum(sparse)
        with POST_NORM:
            both = ops.add_gated(ops.rms_norm(sparse, self.experts_post_norm), dense, None)
            return x, ops.rms_norm(both, self.post_norm)

    def parameters(self) -> Iterator[Parameter]:
        """Declare the MLP, the experts and the norms between them."""
        norms = self.router_norm, self.moe.norm, self.experts_post_norm, self.post_norm
        for holder in (self.mlp, self.moe, *norms):
            yield from holder.parameters()


class PerLayerInputs:
    """What each layer reads of a token besides the residual stream: a part of an embedding of its
    own, added to a part of a projection of the token's embedding. (Gemma 4, per-layer embeddings.)
    """

    def __init__(self, config: ModelConfig, shard: Shard = ALONE):
        hidden, size, layers = config.hidden_size, config.per_layer_size, len(config.layers)
        self.shard, self.tokens = shard, shard.vocab_part(config.vocab_size)
        self.shape = self.tokens.stop - self.tokens.start, layers * size
        self.table: torch.Tensor | None = None
        self.projection = Linear(hidden, layers * size, False, DENSE)
        # Of the projection / √hidden, which is the same with another eps. The sum of both parts is
        # divided by √2.
        self.norm = Norm(size, NormSpec(config.norm.eps * hidden), factor=0.5**0.5)
        self._scale = (size / 2) ** 0.5
        self._hidden = Norm(hidden, config.norm, is_identity=True)
        self._size = Norm(size, config.norm, is_identity=True)

    def __call__(self, ops: "Backend", x: "torch.Tensor", ids: "torch.Tensor") -> "torch.Tensor":
        """x float32 [tokens, hidden], the embedding of ids → [tokens, layers, size]."""
        assert self.table is not None
        with EMBEDDING:
            own = self.shard.sum(ops.embed(self.table, ids, self._scale, self.tokens.start))
            _, embedded = ops.add_rms_norm(x, None, self._hidden)
            projected = ops.linear(embedded, self.projection).view(-1, self.norm.size)
            normed = ops.rms_norm(projected, self.norm)
            _, inputs = ops.add_rms_norm(own.view(normed.shape), normed, self._size)
        return inputs.view(len(ids), -1, self.norm.size)

    def parameters(self) -> Iterator[Parameter]:
        """Declare the embedding, the projection and its norm."""
        yield Parameter(self, "table", self.shape)
        yield from self.projection.parameters()
        yield from self.norm.parameters()


class PerLayerMlp:
    """The last block of a layer, a small MLP whose ups are the layer's part of `PerLayerInputs`."""

    def __init__(self, config: ModelConfig):
        hidden, size = config.hidden_size, config.per_layer_size
        self.activation = config.activation
        self.gate, self.down = (
            Linear(hidden, size, False, DENSE),
            Linear(size, hidden, False, DENSE),
        )
        self.post_norm = Norm(hidden, config.norm)
        self._identity = Norm(hidden, config.norm, is_identity=True)

    def __call__(
        self, ops: "Backend", x: "torch.Tensor", delta: "torch.Tensor", own: "torch.Tensor"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """x, delta [tokens, hidden], own [tokens, size] → (x + delta, the block's result)."""
        with PER_LAYER_MLP:
            x, rounded = ops.add_rms_norm(x, delta, self._identity)
            inner = ops.gated(ops.linear(rounded, self.gate), own, self.activation)
            return x, ops.rms_norm(ops.linear(inner, self.down), self.post_norm)

    def parameters(self) -> Iterator[Parameter]:
        """Declare the linears and the norm."""
        for holder in (self.gate, self.down, self.post_norm):
            yield from holder.parameters()


LayerMlp = Mlp | Moe | MlpBesideExperts


def make_mlp(config: ModelConfig, layer: LayerConfig, shard: Shard = ALONE) -> LayerMlp:
    """The MLP of a layer: dense, experts, or both."""
    if not layer.sparse:
        return Mlp(config, layer, shard)
    return (MlpBesideExperts if config.has_mlp(layer) else Moe)(config, layer, shard)


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
