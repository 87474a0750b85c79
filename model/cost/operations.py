"""The cost of every operation of a step: FLOPs by unit, bytes by content and kernel launches.

All figures are integers computed from the config alone, without torch. Conventions:

- `context` includes the query tokens. Attention scores cover query · context positions (the
  convention of the documents and of MFU), or only the positions that a causal mask keeps if
  `causal` is set. A sliding window limits both.
- Keys and values cross the memory bus once per position: new ones when they are written, earlier
  ones when they are read. With a sliding window only positions inside it are read.
- Unfused, each operation reads its input and writes its output (qwen2-layer-data-flow). Fused, a
  layer reads its input once and writes the results of its two blocks (roofline-prefill-decode).
- The head runs for the rows that need logits: one per sequence in prefill, else every token.
- Of the experts, only the expected number of distinct selected ones is read.
- With tensor parallelism the figures are those of one GPU; communication is in `interconnect`.
"""

from collections import Counter
from dataclasses import replace
from itertools import chain

from model.config import LatentConfig, LayerConfig, ModelConfig, MoeConfig
from model.cost import flops
from model.cost.flops import Flops
from model.cost.workload import (
    DTYPE_BYTES,
    Bytes,
    Op,
    Product,
    Workload,
    kv_vector_bytes,
    state_bytes,
)
from model.formats import DENSE, WeightFormat, full_interface
from model.sharding import Shard
from model.transformer import Transformer


def check_tensor_parallel(config: ModelConfig, size: int) -> None:
    """Raise ValueError with the possible sizes if the model cannot be split `size` ways."""
    if _can_be_split(config, size):
        return
    possible = [n for n in range(1, config.num_heads + 1) if _can_be_split(config, n)]
    kv_heads = " and ".join(map(str, _kv_head_counts(config)))
    parts = [f"{config.num_heads} heads", f"{kv_heads} KV heads"]
    if any(config.has_mlp(layer) for layer in config.layers):
        parts.append(f"MLP {config.intermediate_size}")
    if config.moe is not None:
        parts.append(f"{config.moe.num_experts} experts")
        if config.moe.shared_size:
            parts.append(f"shared expert {config.moe.shared_size}")
    if config.delta_rule is not None:
        parts.append(f"{config.delta_rule.key_heads} key heads of recurrent layers")
    raise ValueError(
        f"this model ({', '.join(parts)}) cannot be split {size} ways; possible: "
        f"{', '.join(map(str, possible))}"
    )


def _can_be_split(config: ModelConfig, size: int) -> bool:
    """Return whether heads, experts and MLPs divide evenly and every GPU has vocabulary."""
    if config.whole_qk_norm and size > 1:
        return False  # a norm over the heads of all ranks would need one more exchange
    moe, rule = config.moe, config.delta_rule
    dense = any(config.has_mlp(layer) for layer in config.layers)
    return not (
        config.num_heads % size
        or any(kv % size and size % kv for kv in _kv_head_counts(config))
        or (rule is not None and rule.key_heads % size)
        or (moe is not None and (moe.num_experts % size or moe.shared_size % size))
        or (dense and config.intermediate_size % size)
        or (size - 1) * -(-config.vocab_size // size) >= config.vocab_size
    )


def _kv_head_counts(config: ModelConfig) -> list[int]:
    """Return the different numbers of KV heads that layers have."""
    return list(dict.fromkeys(config.heads(layer).num_kv_heads for layer in config.layers))


def distinct_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """Return the expected number of distinct experts that T tokens choose: E·(1 - (1 - k/E)^T).

    Assumes that each token chooses its top_k uniformly and independently.
    """
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


def operations(config: ModelConfig, work: Workload) -> list[Op]:
    """Return the operations of the step in order. Raises ValueError for an impossible split."""
    check_tensor_parallel(config, work.tensor_parallel)
    shard = _ShardCost(config, work)
    found: dict[str, Op] = {}
    for layer, count in Counter(config.layers).items():
        block = shard.recurrent_block if layer.recurrent else shard.attention_block
        for op in chain(block(layer), shard.mlp_block(layer), shard.per_layer_block()):
            one = op.repeated(count)
            found[op.name] = found[op.name].plus(one) if op.name in found else one
    ops = [shard.embedding(), *(found[name] for name in _LAYER_OPS if name in found)]
    ops += shard.head()
    if work.backward:
        return [Op(op.name, op.layer_count, op.flops, Bytes(), 0) for op in ops]
    return ops


def total(ops: list[Op]) -> Op:
    """Return the sum of the operations; its layer_count is the largest of theirs."""
    result = Op("total", 0, Flops(), Bytes(), 0)
    for op in ops:
        result = result.plus(op, max(result.layer_count, op.layer_count))
    return result


def parameter_bytes(config: ModelConfig, dtype: str, tensor_parallel: int = 1) -> int:
    """Return the bytes of weights that one GPU stores, norms in the same dtype as the rest.

    A tied embedding counts once.
    """
    check_tensor_parallel(config, tensor_parallel)
    item = DTYPE_BYTES[dtype]
    # The first rank, because the last may have a smaller part of the vocabulary.
    model = Transformer(config, Shard(0, tensor_parallel))
    return sum(
        full_interface(parameter.format or DENSE).bytes(parameter.shape, item)
        for parameter in model.parameters()
    )


def kv_bytes_per_sequence(
    config: ModelConfig, context: int, dtype: str, tensor_parallel: int = 1
) -> int:
    """Return the bytes of keys and values of one sequence of `context` positions on one GPU.

    The states of recurrent layers are included.
    """
    found = state_bytes(config, DTYPE_BYTES[dtype], tensor_parallel)
    for layer, count in Counter(config.layers).items():
        if layer.kv_source is None and not layer.recurrent:
            heads = config.heads(layer)
            vectors = config.kv_vectors * max(1, heads.num_kv_heads // tensor_parallel) * count
            positions = min(layer.window or context, context)
            found += positions * vectors * kv_vector_bytes(config, heads.head_dim, dtype)
    return found


def activation_accesses(fused: bool, sparse: bool = False) -> int:
    """Return the activation round trips of one layer, as qwen2-layer-data-flow counts them.

    Unfused: each of the nine operations (ten with a router) reads once and writes once. Fused: two,
    the writes after the attention block and after the MLP block.
    """
    return 2 if fused else 2 * (10 if sparse else 9)


_LAYER_OPS = (
    "input_norm qkv_proj rope attention o_proj post_norm router gate_up_proj activation down_proj"
    " per_layer_mlp"
).split()


def _product(form: WeightFormat, rows: float, weights: float) -> Product:
    """Return the product of rows with a weight; e4m3 is multiplied with e4m3 where inputs are."""
    return Product(form.name, rows, weights, is_float8=bool(getattr(form.kept, "inputs", "")))


class _ShardCost:
    """The cost of the operations on one GPU's shard of the model, each for one layer."""

    def __init__(self, config: ModelConfig, work: Workload):
        self.config, self.work = config, work
        self.parts = work.tensor_parallel
        self.item = DTYPE_BYTES[work.dtype]
        self.heads = config.num_heads // self.parts
        self.vocab = -(-config.vocab_size // self.parts)

    def op(
        self, name: str, cost: Flops, weights: int, moved: int, launches: int, *,
        kv: int = 0, fused: tuple[int, int] = (0, 0), product: Product | None = None,
    ) -> Op:  # fmt: skip
        """Make an operation. weights, kv: bytes; moved: values; fused: (moved, launches)."""
        moved, launches = fused if self.work.fused else (moved, launches)
        cost_bytes = Bytes(weights, moved * self.item, kv)
        return Op(name, 1, cost, cost_bytes, launches, () if product is None else (product,))

    def matrix(self, inputs: int, outputs: int, bias: bool, form: WeightFormat = DENSE) -> int:
        """Return the bytes of the weight and bias of a linear layer."""
        return form.bytes((outputs, inputs), self.item) + (outputs * self.item if bias else 0)

    def embedding(self) -> Op:
        size, tokens = self.config.hidden_size, self.work.tokens
        rows = min(tokens, self.config.vocab_size) * size * self.item
        written = tokens * size
        cost = Flops(vector=written if self.config.embedding_scale != 1 else 0)
        own = self.config.per_layer_size * len(self.config.layers)
        product = None
        if own:  # the layers' own embedding and projection, see `model.mlp.PerLayerInputs`
            cost += flops.linear(tokens, size, own, backward=self.work.backward)
            rows += min(tokens, self.config.vocab_size) * own * self.item
            rows += self.matrix(size, own, False)
            product = Product(DENSE.name, tokens, size * own)
            written += 4 * tokens * own
        launches = 5 if own else 1
        return self.op(
            "embedding", cost, rows, written, launches, fused=(written, 1), product=product
        )

    def norm(self, name: str, rows: int, fused: tuple[int, int] = (0, 0)) -> Op:
        size = self.config.hidden_size
        cost = flops.rms_norm(rows, size, self.work.backward)
        return self.op(name, cost, size * self.item, 2 * rows * size, 1, fused=fused)

    def pre_norm(self, name: str, fused: tuple[int, int] = (0, 0)) -> Op:
        """Return the norm of the residual stream, or its conversion where there is no norm."""
        if self.config.pre_norms:
            return self.norm(name, self.work.tokens, fused)
        moved = 2 * self.work.tokens * self.config.hidden_size
        return self.op(name, Flops(), 0, moved, 1, fused=fused)

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
                product=_product(layer.formats.qkv, tokens, hidden * projected),
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
                flops.linear(tokens, query, hidden, c.o_bias, back) + self._residual,
                self.matrix(query, hidden, c.o_bias, layer.formats.out),
                tokens * (query + 2 * hidden),
                2 + self._all_reduce,
                fused=(tokens * hidden, 1 + self._all_reduce),
                product=_product(layer.formats.out, tokens, query * hidden),
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
        multiplied = heads * keys + sum(inputs * outputs for inputs, outputs in shapes)
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
                product=Product(form.name, tokens, multiplied),
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
                expand + out + self._residual,
                self.matrix(own, hidden, c.o_bias, layer.formats.out) + heads * values * self.item,
                tokens * (heads * latent.rank + 2 * own + 2 * hidden),
                3 + self._all_reduce,
                fused=(tokens * hidden, 1 + self._all_reduce),
                product=Product(layer.formats.out.name, tokens, own * hidden + heads * values),
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
                product=Product(layer.formats.qkv.name, tokens, hidden * (wide + gates)),
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
                flops.linear(tokens, values, hidden, False, back) + self._residual,
                self.matrix(values, hidden, False, layer.formats.out),
                tokens * (values + 2 * hidden),
                2 + self._all_reduce,
                fused=(tokens * hidden, 1 + self._all_reduce),
                product=Product(layer.formats.out.name, tokens, values * hidden),
            ),
        ]

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
        cost = flops.linear(tokens, hidden, size, backward=back) * 2 + self._residual
        cost += flops.swiglu(tokens, size, back) + flops.rms_norm(tokens, hidden, back)
        weights = self.matrix(hidden, size, False) * 2 + hidden * self.item
        product = Product(DENSE.name, tokens, 2 * hidden * size)
        moved = tokens * (4 * hidden + 4 * size)
        return [self.op("per_layer_mlp", cost, weights, moved, 6, product=product)]

    def head(self) -> list[Op]:
        """Return the final norm and the unembedding of the rows that need logits."""
        hidden, rows = self.config.hidden_size, self.work.logits_rows
        moved = rows * (hidden + self.vocab)
        cost = flops.linear(rows, hidden, self.vocab, backward=self.work.backward)
        if self.config.logits_scale != 1:
            cost += Flops(vector=rows * self.vocab)
        weights = self.matrix(hidden, self.vocab, False, self.config.head_format)
        head = _product(self.config.head_format, rows, hidden * self.vocab)
        return [
            self.norm("final_norm", rows),
            self.op(
                "lm_head",
                cost,
                weights,
                moved,
                1,
                fused=(moved, 1),
                product=replace(head, kind=DENSE.name),
            ),
        ]

    @property
    def _residual(self) -> Flops:
        """FLOPs of adding a block's output, scaled in some families, to the residual stream."""
        values = self.work.tokens * self.config.hidden_size
        return Flops(vector=values if self.config.residual_scale == 1 else 2 * values)

    @property
    def _all_reduce(self) -> int:
        return 1 if self.parts > 1 else 0

    def _dense(self, layer: LayerConfig) -> list[Op]:
        c, tokens, back = self.config, self.work.tokens, self.work.backward
        hidden, size = c.hidden_size, c.mlp_size(layer) // self.parts
        up = c.activation.parts * size
        down = flops.linear(tokens, size, hidden, c.mlp_bias, back)
        return self._mlp(
            flops.linear(tokens, hidden, up, c.mlp_bias, back),
            flops.swiglu(tokens, size, back),
            down + self._residual,
            (
                self.matrix(hidden, up, c.mlp_bias, layer.formats.gate_up),
                self.matrix(size, hidden, c.mlp_bias, layer.formats.down),
            ),
            pairs=tokens,
            size=size,
            gate_up_launches=2,
            products=(
                _product(layer.formats.gate_up, tokens, hidden * up),
                _product(layer.formats.down, tokens, hidden * size),
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
                _product(forms.gate_up, tokens, 2 * hidden * size),
                _product(forms.down, tokens, hidden * size),
            ),
        )
        if self.work.fused:
            return self._in_one_kernel(ops)
        *first, last = ops  # the results of all ranks are added with those of the other experts
        return [*first, replace(last, launches=last.launches - self._all_reduce)]

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
        combine = flops.weighted_sum(1, pairs, hidden, back) + self._residual
        router = self.op(
            "router",
            route + flops.softmax(tokens, chosen, back),
            self.matrix(hidden, moe.num_experts, moe.biases),
            tokens * (hidden + moe.num_experts),
            2,
            product=Product(DENSE.name, tokens, hidden * moe.num_experts),
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
                _product(layer.formats.experts, pairs / read, 2 * read * hidden * size),
                _product(layer.formats.experts, pairs / read, read * hidden * size),
            ),
        )
        return [router, *rest]

    def _mlp(
        self, gate_up: Flops, activation: Flops, down: Flops, weights: tuple[int, int], *,
        pairs: int, size: int, gate_up_launches: int, products: tuple[Product, Product],
    ) -> list[Op]:  # fmt: skip
        """Return gate/up, activation and down; products: of the first and of the last."""
        written, reduce = self.work.tokens * self.config.hidden_size, self._all_reduce
        read = pairs * self.config.hidden_size
        return [
            self.op(
                "gate_up_proj",
                gate_up,
                weights[0],
                read + 2 * pairs * size,
                gate_up_launches,
                product=products[0],
            ),
            self.op("activation", activation, 0, 3 * pairs * size, 1),
            self.op(
                "down_proj",
                down,
                weights[1],
                pairs * size + 2 * written,
                2 + reduce,
                fused=(written, 1 + reduce),
                product=products[1],
            ),
        ]
