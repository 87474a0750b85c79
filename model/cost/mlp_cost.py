"""The cost of MLPs and of mixtures of experts."""

from dataclasses import replace

from model.config import LayerConfig, MoeConfig
from model.cost import flops
from model.cost.flops import Flops
from model.cost.shard_cost import ShardCost, product_of
from model.cost.workload import Op, Product
from model.formats import DENSE


def distinct_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """Return the expected number of distinct experts that T tokens choose: E·(1 - (1 - k/E)^T).

    Assumes that each token chooses its top_k uniformly and independently.
    """
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


class MlpCost(ShardCost):
    """The operations of a layer's MLP, and of its per-layer embeddings."""

    def mlp_block(self, layer: LayerConfig) -> list[Op]:
        """Return norm, the router if there are experts, gate/up, activation, down with residual."""
        norm, moe = self.pre_norm("post_norm"), self.config.moe
        if self.config.post_norms:  # of what attention and MLP add, as the first is timed
            own = self.norm("post_norm", self.work.tokens)
            norm = norm.plus(own, 1).plus(own, 1)
        if not layer.sparse or moe is None:
            return [norm, *self._dense(layer)]
        found = {op.name: op for op in [norm, *self._experts(layer, moe)]}
        beside = self._shared_expert(layer, moe) if moe.shared_size else []
        if moe.beside_mlp:  # with norms before the router and the experts and after both parts
            beside = self._in_one_kernel(self._dense(layer))
            beside += [self.pre_norm("post_norm")] * 4
        for op in beside:
            found[op.name] = found[op.name].plus(op, 1)
        return list(found.values())

    def per_layer_block(self) -> list[Op]:
        """Return the MLP that reads a layer's part of a token's own embedding, if there is one."""
        tokens, hidden, size = self.work.tokens, self.config.hidden_size, self.config.per_layer_size
        if not size:
            return []
        back = self.work.backward
        cost = flops.linear(tokens, hidden, size, backward=back) * 2 + self.residual
        cost += flops.swiglu(tokens, size, back) + flops.rms_norm(tokens, hidden, back)
        weights = self.matrix(hidden, size, False) * 2 + hidden * self.item
        product = Product(DENSE.name, tokens, 2 * hidden * size)
        moved = tokens * (4 * hidden + 4 * size)
        return [self.op("per_layer_mlp", cost, weights, moved, 6, products=(product,))]

    def _dense(self, layer: LayerConfig) -> list[Op]:
        c, tokens, back = self.config, self.work.tokens, self.work.backward
        hidden, size = c.hidden_size, c.mlp_size(layer) // self.parts
        up = c.activation.parts * size
        down = flops.linear(tokens, size, hidden, c.mlp_bias, back)
        return self._mlp(
            flops.linear(tokens, hidden, up, c.mlp_bias, back),
            flops.swiglu(tokens, size, back),
            down + self.residual,
            (
                self.matrix(hidden, up, c.mlp_bias, layer.formats.gate_up),
                self.matrix(size, hidden, c.mlp_bias, layer.formats.down),
            ),
            pairs=tokens,
            size=size,
            gate_up_launches=2,
            products=(
                product_of(layer.formats.gate_up, tokens, hidden * up),
                product_of(layer.formats.down, tokens, hidden * size),
            ),
        )

    def _shared_expert(self, layer: LayerConfig, moe: MoeConfig) -> list[Op]:
        """Return what the expert that all tokens share adds to the operations of the others."""
        tokens, back, forms = self.work.tokens, self.work.backward, layer.formats
        hidden, size = self.config.hidden_size, moe.shared_size // self.parts
        down = flops.linear(tokens, size, hidden, backward=back)
        down += flops.weighted_sum(tokens, 1, hidden, back)
        gate_bytes = 0
        if moe.shared_gate:
            down += flops.linear(tokens, hidden, 1, backward=back)
            gate_bytes = self.matrix(hidden, 1, False)
        ops = self._mlp(
            flops.linear(tokens, hidden, 2 * size, backward=back),
            flops.swiglu(tokens, size, back),
            down,
            (
                self.matrix(hidden, 2 * size, False, forms.gate_up),
                self.matrix(size, hidden, False, forms.down) + gate_bytes,
            ),
            pairs=tokens,
            size=size,
            gate_up_launches=1,
            products=(
                product_of(forms.gate_up, tokens, 2 * hidden * size),
                product_of(forms.down, tokens, hidden * size),
            ),
        )
        if self.work.fused:
            return self._in_one_kernel(ops)
        *first, last = ops  # the results of all ranks are added with those of the other experts
        return [*first, replace(last, launches=last.launches - self.all_reduce)]

    def _in_one_kernel(self, ops: list[Op]) -> list[Op]:
        """Return the operations of an MLP; fused, as parts of the experts' kernel."""
        if not self.work.fused:
            return ops
        return [replace(op, launches=0, bytes=replace(op.bytes, activations=0)) for op in ops]

    def _experts(self, layer: LayerConfig, moe: MoeConfig) -> list[Op]:
        c, tokens, back = self.config, self.work.tokens, self.work.backward
        hidden, size = c.hidden_size, moe.intermediate_size
        # Pairs of token and expert on this GPU, rounded to the nearest integer.
        pairs = (tokens * moe.router.top_k + self.parts // 2) // self.parts
        read = distinct_experts(moe.num_experts, moe.router.top_k, tokens) / self.parts
        gate_up = self.matrix(hidden, 2 * size, moe.biases, layer.formats.experts)
        down = self.matrix(size, hidden, moe.biases, layer.formats.experts)
        chosen = moe.router.top_k if moe.router.softmax_after_top_k else moe.num_experts
        route = flops.linear(tokens, hidden, moe.num_experts, moe.biases, back)
        combine = flops.weighted_sum(1, pairs, hidden, back) + self.residual
        router = self.op(
            "router",
            route + flops.softmax(tokens, chosen, back),
            self.matrix(hidden, moe.num_experts, moe.biases),
            tokens * (hidden + moe.num_experts),
            2,
            products=(Product(DENSE.name, tokens, hidden * moe.num_experts),),
        )
        rest = self._mlp(
            flops.linear(pairs, hidden, 2 * size, moe.biases, back),
            flops.swiglu(pairs, size, back),
            flops.linear(pairs, size, hidden, moe.biases, back) + combine,
            (round(gate_up * read), round(down * read)),  # to the nearest byte
            pairs=pairs,
            size=size,
            gate_up_launches=1,
            products=(
                product_of(layer.formats.experts, pairs / read, 2 * read * hidden * size),
                product_of(layer.formats.experts, pairs / read, read * hidden * size),
            ),
        )
        return [router, *rest]

    def _mlp(
        self, gate_up: Flops, activation: Flops, down: Flops, weights: tuple[int, int], *,
        pairs: int, size: int, gate_up_launches: int, products: tuple[Product, Product],
    ) -> list[Op]:  # fmt: skip
        """Return gate/up, activation and down; products: of the first and of the last."""
        written, reduce = self.work.tokens * self.config.hidden_size, self.all_reduce
        parts = self.config.activation.parts
        read = pairs * self.config.hidden_size
        return [
            self.op(
                "gate_up_proj",
                gate_up,
                weights[0],
                read + parts * pairs * size,
                gate_up_launches,
                products=products[:1],
            ),
            self.op("activation", activation, 0, (parts + 1) * pairs * size, 1),
            self.op(
                "down_proj",
                down,
                weights[1],
                pairs * size + 2 * written,
                2 + reduce,
                fused=(written, 1 + reduce),
                products=products[1:],
            ),
        ]
