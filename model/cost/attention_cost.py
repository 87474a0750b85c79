"""The cost of attention and of recurrent layers."""

from model.config import LatentConfig, LayerConfig
from model.cost import flops
from model.cost.flops import Flops
from model.cost.shard_cost import ShardCost, product_of
from model.cost.workload import Op, Product, kv_vector_bytes
from model.formats import DENSE


class AttentionCost(ShardCost):
    """The operations before a layer's MLP."""

    def attention_block(self, layer: LayerConfig) -> list[Op]:
        """Return norm, QKV, rotary with the norms of the heads, attention, output with residual."""
        c, work, back = self.config, self.work, self.work.backward
        if c.latent is not None:
            return self._latent_block(layer, c.latent)
        tokens, hidden, sizes = work.tokens, c.hidden_size, c.heads(layer)
        head_dim, stored_heads = sizes.head_dim, max(1, sizes.num_kv_heads // self.parts)
        kv_heads = stored_heads if layer.kv_source is None else 0  # that this layer computes
        query, key = self.heads * head_dim, kv_heads * head_dim
        projected = query + (1 if sizes.values_are_keys else 2) * key
        projected += query if c.output_gate else 0
        rotated_heads = self.heads + kv_heads
        rotate = flops.rotary(tokens, rotated_heads, sizes.rotary_dim)
        norm_weights = 0
        if c.qk_norm:
            rotate += flops.rms_norm(tokens * rotated_heads, head_dim, back)
            norm_weights = head_dim * (rotated_heads if c.whole_qk_norm else 2)
        attend = flops.attention(work.attended(layer.window), self.heads, head_dim, back)
        if c.output_gate:
            attend += Flops(vector=3 * tokens * query, special=tokens * query)
        return [
            self.pre_norm("input_norm", fused=(tokens * hidden, 0)),
            self.op(
                "qkv_proj",
                flops.linear(tokens, hidden, projected, c.qkv_bias, back),
                self.matrix(hidden, projected, c.qkv_bias, layer.formats.qkv),
                tokens * (hidden + projected),
                3,
                products=(product_of(layer.formats.qkv, tokens, hidden * projected),),
            ),
            self.op(
                "rope",
                rotate,
                norm_weights * self.item,
                2 * tokens * (query + key),
                4 if c.qk_norm else 2,
            ),
            self.op(
                "attention",
                attend,
                self.heads * self.item if c.sinks else 0,
                tokens * (2 * query + 2 * key),
                1,
                kv=2
                * stored_heads
                * work.kv_positions(layer.window)
                * kv_vector_bytes(c, head_dim, work.dtype),
            ),
            self.op(
                "o_proj",
                flops.linear(tokens, query, hidden, c.o_bias, back) + self.residual,
                self.matrix(query, hidden, c.o_bias, layer.formats.out),
                tokens * (query + 2 * hidden),
                2 + self.all_reduce,
                fused=(tokens * hidden, 1 + self.all_reduce),
                products=(product_of(layer.formats.out, tokens, query * hidden),),
            ),
        ]

    def _latent_block(self, layer: LayerConfig, latent: LatentConfig) -> list[Op]:
        """Return the same operations of latent attention, whose latents every GPU has."""
        c, work, back, form = self.config, self.work, self.work.backward, layer.formats.qkv
        tokens, hidden, heads = work.tokens, c.hidden_size, self.heads
        width, own = heads * (latent.plain_dim + c.rotary_dim), heads * latent.value_dim
        shapes = [(latent.query_rank or hidden, width), (hidden, c.head_dim)]
        if latent.query_rank:
            shapes.append((hidden, latent.query_rank))
        keys, values = latent.plain_dim * latent.rank, latent.rank * latent.value_dim
        norms = latent.rank + (latent.query_rank or 0)
        project = flops.rms_norm(tokens, norms, back)
        project += flops.linear(tokens, heads, keys, backward=back)
        for inputs, outputs in shapes:
            project += flops.linear(tokens, inputs, outputs, backward=back)
        moved = tokens * sum(inputs + outputs for inputs, outputs in shapes)
        multiplied = sum(inputs * outputs for inputs, outputs in shapes)
        attend = flops.latent_attention(
            work.attended(layer.window), heads, c.head_dim, latent.rank, back
        )
        expand = flops.linear(tokens, heads, values, backward=back)
        out = flops.linear(tokens, own, hidden, c.o_bias, back)
        query, stored = heads * c.head_dim, kv_vector_bytes(c, c.head_dim, work.dtype)
        weights = sum(self.matrix(*shape, latent.bias, form) for shape in shapes)
        return [
            self.pre_norm("input_norm", fused=(tokens * hidden, 0)),
            self.op(
                "qkv_proj",
                project,
                weights + (norms + heads * keys) * self.item,
                moved + tokens * (width + query),
                len(shapes) + (3 if latent.query_rank else 2),
                products=(
                    product_of(form, tokens, multiplied),
                    Product(DENSE.name, tokens, heads * keys),
                ),
            ),
            self.op(
                "rope",
                flops.rotary(tokens, heads + 1, c.rotary_dim),
                0,
                2 * tokens * (heads * c.rotary_dim + c.head_dim),
                1,
            ),
            self.op(
                "attention",
                attend,
                0,
                tokens * (query + heads * latent.rank),
                1,
                kv=work.kv_positions(layer.window) * stored,
            ),
            self.op(
                "o_proj",
                expand + out + self.residual,
                self.matrix(own, hidden, c.o_bias, layer.formats.out) + heads * values * self.item,
                tokens * (heads * latent.rank + 2 * own + 2 * hidden),
                3 + self.all_reduce,
                fused=(tokens * hidden, 1 + self.all_reduce),
                products=(
                    product_of(layer.formats.out, tokens, own * hidden),
                    Product(DENSE.name, tokens, heads * values),
                ),
            ),
        ]

    def recurrent_block(self, layer: LayerConfig) -> list[Op]:
        """Return norm, projections, the recurrence with its gated norm, output with residual.

        The states are read and written once for each sequence, and count as KV.
        """
        c, work, back = self.config, self.work, self.work.backward
        assert c.delta_rule is not None  # the config says that the layer is recurrent
        spec, tokens, hidden = c.delta_rule.part(self.parts), work.tokens, c.hidden_size
        values = spec.value_heads * spec.value_dim
        wide, gates = spec.channels + values, 2 * spec.value_heads
        rule = flops.causal_conv(tokens, spec.channels, spec.kernel)
        rule += flops.delta_rule(tokens, spec.value_heads, spec.key_dim, spec.value_dim)
        rule += flops.rms_norm(tokens * spec.value_heads, spec.value_dim, back)
        rule += flops.swiglu(tokens, values, back)
        small = spec.kernel * spec.channels + gates + spec.value_dim  # float32
        return [
            self.pre_norm("input_norm", fused=(tokens * hidden, 0)),
            self.op(
                "qkv_proj",
                flops.linear(tokens, hidden, wide + gates, False, back),
                self.matrix(hidden, wide, False, layer.formats.qkv)
                + self.matrix(hidden, gates, False),
                tokens * (hidden + wide + gates),
                2,
                products=(
                    product_of(layer.formats.qkv, tokens, hidden * wide),
                    Product(DENSE.name, tokens, hidden * gates),
                ),
            ),
            self.op(
                "attention",
                rule,
                4 * small,
                tokens * (3 * spec.channels + 4 * values + gates),
                3,
                kv=2 * work.batch * spec.state_bytes(self.item),
            ),
            self.op(
                "o_proj",
                flops.linear(tokens, values, hidden, False, back) + self.residual,
                self.matrix(values, hidden, False, layer.formats.out),
                tokens * (values + 2 * hidden),
                2 + self.all_reduce,
                fused=(tokens * hidden, 1 + self.all_reduce),
                products=(product_of(layer.formats.out, tokens, values * hidden),),
            ),
        ]
