"""Which tensors of a checkpoint fill which parameters of the decoder.

A parameter may consist of several tensors (q, k and v of one fused weight, the experts of a
stack), and a tensor may contain several parts of a parameter (a fused gate and up). Each pair of
a tensor and a part is a `Piece`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from model.config import ModelConfig
from model.families.tensor_names import (
    DeltaRuleNames,
    ExpertNames,
    LinearName,
    PerLayerNames,
    TensorNames,
)
from model.formats.format import Part
from model.layers.attention import Attention
from model.layers.delta_rule import DeltaRule
from model.layers.latent_attention import LatentAttention
from model.layers.mlp import Mlp, MlpBesideExperts, Moe, PerLayerInputs, PerLayerMlp
from model.ops.specs import Linear
from model.sharding import Shard
from model.transformer import Layer, Transformer


def _all() -> slice:
    return slice(None)


@dataclass(frozen=True)
class NamedWeight:
    """A weight, or a vector, of a checkpoint, in whatever format it is stored."""

    name: str  # of its tensor if it is dense
    shape: tuple[int, ...]
    part: Part = ()  # what this rank reads
    module: str | None = None  # the module whose format it has; None: dense
    is_embedding: bool = False
    transposed: bool = False  # see WeightFormat.stored


@dataclass(frozen=True)
class Piece:
    """A weight of the checkpoint, and how it fills a parameter."""

    weight: NamedWeight
    holder: Any  # the object whose attribute is the parameter
    attribute: str
    write: Callable[[Any, Any], None]  # (the parameter's storage, WeightFormat.source)

    @property
    def holder_key(self) -> tuple[int, str]:
        """What identifies the parameter."""
        return id(self.holder), self.attribute


@dataclass
class TensorMap:
    """Every weight that a checkpoint of the model's config must contain."""

    pieces: list[Piece] = field(default_factory=list)
    elsewhere: list[NamedWeight] = field(default_factory=list)  # read only by other ranks


@dataclass(frozen=True)
class _LinearPart:
    """A part of a linear of the decoder, such as q."""

    linear: Linear
    outputs: int  # of all ranks together
    inputs: int
    rows: slice = field(default_factory=_all)  # this rank's part of the outputs
    columns: slice = field(default_factory=_all)  # this rank's part of the inputs
    first: int = 0  # row of the linear where this rank's rows begin
    block: int = 0  # rows that alternate with those of other parts; 0: one part after another
    # Rows are in groups of so many, and of the last so many of a group the stored ones alternate
    # between the two coordinates of rotated pairs, which are halves in the linear.
    pairs: tuple[int, int] = (0, 0)


def tensor_map(model: Transformer, names: TensorNames) -> TensorMap:
    """Map the tensors of a Hugging Face checkpoint to the parameters of this rank.

    names: the family's, or those of a checkpoint that stores only one of two tied tensors.
    """
    config, shard, found = model.config, model.shard, TensorMap()
    table, own = (config.vocab_size, config.hidden_size), (shard.vocab_part(config.vocab_size),)
    found.pieces += [
        _whole(_weight(names.embedding, table, own, is_embedding=True), model, "embedding"),
    ]
    if model.final_norm.is_stored:
        found.pieces.append(_whole(NamedWeight(names.final_norm, table[1:]), model.final_norm))
    if not config.tie_word_embeddings:
        found.pieces.append(_whole(_weight(names.head, table, own), model.head))
    for i, layer in enumerate(model.layers):
        prefix = names.layer.format(layer=i)
        found.pieces += _layer_vectors(prefix, names, layer, config, shard)
        attention = layer.attention
        if isinstance(attention, DeltaRule):
            found.pieces += _delta_rule_pieces(prefix, names.delta_rule, attention, config, shard)
        else:
            kv_heads = config.heads(config.layers[i]).num_kv_heads
            found.pieces += _attention(prefix, names.attention, attention, config, kv_heads, shard)
        mlp = layer.mlp.mlp if isinstance(layer.mlp, MlpBesideExperts) else layer.mlp
        moe = layer.mlp.moe if isinstance(layer.mlp, MlpBesideExperts) else layer.mlp
        if isinstance(moe, Moe):
            _add_experts(found, prefix, names.experts, moe, config)
        if isinstance(mlp, Mlp):
            size = config.mlp_size(config.layers[i])
            parts = _gated_parts(mlp.gate_up, mlp.down, config.hidden_size, size, shard)
            found.pieces += _linears(prefix, names.mlp, parts, shard)
        if layer.per_layer is not None:
            found.pieces += _per_layer_mlp(prefix, names.per_layer, layer.per_layer, shard)
    if model.per_layer is not None:
        found.pieces += _per_layer_inputs(names.per_layer, model.per_layer, config, shard)
    return found


def _per_layer_mlp(
    prefix: str, names: PerLayerNames, own: PerLayerMlp, shard: Shard
) -> Iterator[Piece]:
    hidden, size = own.gate.inputs, own.gate.outputs
    parts = {
        "gate": _LinearPart(own.gate, size, hidden),
        "down": _LinearPart(own.down, hidden, size),
    }
    yield from _linears(prefix, ((names.gate, ("gate",)), (names.down, ("down",))), parts, shard)


def _per_layer_inputs(
    names: PerLayerNames, own: PerLayerInputs, config: ModelConfig, shard: Shard
) -> Iterator[Piece]:
    projection = own.projection
    shape = config.vocab_size, projection.outputs
    table = _weight(names.embedding, shape, (own.tokens,), is_embedding=True)
    yield _whole(table, own, "table")
    yield _whole(NamedWeight(names.norm, (own.norm.size,)), own.norm)
    part = _LinearPart(projection, projection.outputs, projection.inputs)
    yield from _linears("", ((names.projection, ("all",)),), {"all": part}, shard)


def _weight(
    name: str, shape: tuple[int, ...], part: Part = (), *, is_embedding: bool = False
) -> NamedWeight:
    """A weight of a module of its own."""
    return NamedWeight(name, shape, part, name.removesuffix(".weight"), is_embedding)


def _whole(weight: NamedWeight, holder: Any, attribute: str = "weight") -> Piece:
    """The piece that fills a whole parameter."""
    return Piece(weight, holder, attribute, lambda storage, source: storage.copy_(source))


def _layer_vectors(
    prefix: str, names: TensorNames, layer: Layer, config: ModelConfig, shard: Shard
) -> Iterator[Piece]:
    attention, mlp = layer.attention, layer.mlp
    norms = [
        (names.attention_norm, attention.norm),
        (names.mlp_norm, mlp.norm),
        (names.mlp_post_norm, getattr(mlp, "post_norm", None)),
    ]
    if isinstance(attention, DeltaRule):
        norms.append((names.delta_rule.norm, attention.head_norm))
    else:
        norms.append((names.attention_post_norm, attention.post_norm))
        norms.append((names.q_norm, attention.heads.q_norm))
        norms.append((names.k_norm, attention.heads.k_norm))
        norms.append((names.query_norm, getattr(attention, "query_norm", None)))
        norms.append((names.latent_norm, getattr(attention, "latent_norm", None)))
    if isinstance(mlp, MlpBesideExperts):
        norms += [
            (names.experts.router_norm, mlp.router_norm),
            (names.experts.norm, mlp.moe.norm),
            (names.experts.mlp_post_norm, mlp.mlp.post_norm),
            (names.experts.post_norm, mlp.experts_post_norm),
        ]
    if layer.per_layer is not None:
        norms.append((names.per_layer.post_norm, layer.per_layer.post_norm))
    for name, norm in norms:
        if norm is not None and norm.is_stored:
            yield _whole(NamedWeight(prefix + name, (norm.size,)), norm)
    if layer.has_scalar:
        yield _whole(NamedWeight(prefix + names.layer_scalar, (1,)), layer, "scalar")
    if isinstance(attention, Attention) and attention.has_sinks:
        heads = shard.part(config.num_heads)
        sinks = NamedWeight(prefix + names.sinks, (config.num_heads,), (heads,))
        yield _whole(sinks, attention, "sinks")


def _attention(
    prefix: str,
    names: tuple[LinearName, ...],
    attention: Attention | LatentAttention,
    config: ModelConfig,
    kv_heads: int,
    shard: Shard,
) -> Iterator[Piece]:
    if isinstance(attention, Attention):
        parts = _attention_parts(attention, config, kv_heads, shard)
        yield from _linears(prefix, names, parts, shard)
        return
    parts = _latent_parts(attention, config, shard)
    stored = tuple(name for name in names if set(name[1]) <= parts.keys())
    yield from _linears(prefix, stored, parts, shard)
    (stem,) = (stem for stem, own in names if own == ("kv",))
    yield from _head_linears(f"{prefix}{stem}.weight", attention, config, shard)


def _latent_parts(
    attention: LatentAttention, config: ModelConfig, shard: Shard
) -> dict[str, _LinearPart]:
    latent, hidden, rotary = config.latent, config.hidden_size, config.rotary_dim
    assert latent is not None  # the model has such attention
    head_dim, heads = latent.plain_dim + rotary, shard.part(config.num_heads)
    pairs = rotary if latent.has_interleaved_pairs else 0
    query = "direct_q" if attention.query_down is None else "q"
    parts = {
        query: _LinearPart(
            attention.query,
            config.num_heads * head_dim,
            attention.query.inputs,
            _of_heads(heads, head_dim),
            pairs=(head_dim, pairs),
        ),
        "kv_down": _LinearPart(
            attention.latent, config.head_dim, hidden, pairs=(config.head_dim, pairs)
        ),
        "o": _LinearPart(
            attention.out,
            hidden,
            config.num_heads * latent.value_dim,
            columns=_of_heads(heads, latent.value_dim),
        ),
    }
    if attention.query_down is not None:
        parts["q_down"] = _LinearPart(attention.query_down, attention.query_down.outputs, hidden)
    return parts


def _head_linears(
    name: str, attention: LatentAttention, config: ModelConfig, shard: Shard
) -> Iterator[Piece]:
    """The pieces of the projection from latents to each head's keys, transposed, and values."""
    absorb, expand = attention.absorb, attention.expand
    keys, rows = absorb.inputs, absorb.inputs + expand.outputs
    own = _of_heads(shard.part(config.num_heads), rows)
    weight = _weight(name, (config.num_heads * rows, expand.inputs), (own,))

    def write_keys(storage: Any, source: Any) -> None:
        for head in range(absorb.heads):
            storage[head].copy_(source[head * rows : head * rows + keys].T)

    def write_values(storage: Any, source: Any) -> None:
        for head in range(expand.heads):
            storage[head].copy_(source[head * rows + keys : (head + 1) * rows])

    yield Piece(weight, absorb, "weight", write_keys)
    yield Piece(weight, expand, "weight", write_values)


def _attention_parts(
    attention: Attention, config: ModelConfig, kv_heads: int, shard: Shard
) -> dict[str, _LinearPart]:
    hidden, own = config.hidden_size, attention.heads
    head_dim = own.head_dim
    q_rows = _of_heads(shard.part(config.num_heads), head_dim)
    kv_rows = _of_heads(shard.kv_part(kv_heads), head_dim)
    q_width, kv_width = config.num_heads * head_dim, kv_heads * head_dim
    first_k = own.heads * head_dim
    first_v = first_k + own.kv_heads * head_dim
    block = head_dim if attention.gate is not None else 0
    found = {
        "q": _LinearPart(attention.qkv, q_width, hidden, q_rows, block=block),
        "o": _LinearPart(attention.out, hidden, q_width, columns=q_rows),
    }
    if attention.gate is not None:
        found["gate"] = _LinearPart(attention.gate, q_width, hidden, q_rows, block=block)
    for part, first in zip("kv", (first_k, first_v), strict=True):
        if own.kv_heads and (part == "k" or not own.values_are_keys):
            found[part] = _LinearPart(attention.qkv, kv_width, hidden, kv_rows, first=first)
    return found


def _of_heads(heads: slice, head_dim: int) -> slice:
    return slice(heads.start * head_dim, heads.stop * head_dim)


def _delta_rule_pieces(
    prefix: str, names: DeltaRuleNames, layer: DeltaRule, config: ModelConfig, shard: Shard
) -> Iterator[Piece]:
    assert config.delta_rule is not None  # the config says that the layer is recurrent
    spec, hidden = config.delta_rule, config.hidden_size
    keys, values = shard.part(spec.key_heads), shard.part(spec.value_heads)
    widths = {  # heads of all ranks, those of this rank, and the size of a head
        "q": (spec.key_heads, keys, spec.key_dim),
        "k": (spec.key_heads, keys, spec.key_dim),
        "v": (spec.value_heads, values, spec.value_dim),
        "z": (spec.value_heads, values, spec.value_dim),
        "b": (spec.value_heads, values, 1),
        "a": (spec.value_heads, values, 1),
    }
    parts, first = dict[str, _LinearPart](), 0
    for name, (heads, of_rank, size) in widths.items():
        linear = layer.gates_in if size == 1 else layer.qkv_gate
        first = 0 if name == "b" else first
        block = size * (heads // spec.key_heads) if names.interleaved else 0
        rows = _of_heads(of_rank, size)
        parts[name] = _LinearPart(linear, heads * size, hidden, rows, first=first, block=block)
        first += rows.stop - rows.start
    of_values = _of_heads(values, spec.value_dim)
    parts["out"] = _LinearPart(
        layer.out, hidden, spec.value_heads * spec.value_dim, columns=of_values
    )
    yield from _linears(prefix, names.linears, parts, shard)
    shape = (spec.channels, 1, spec.kernel)
    above = first = 0
    for name in ("q", "k", "v"):
        rows, width = parts[name].rows, parts[name].outputs
        stored = slice(above + rows.start, above + rows.stop)
        conv = NamedWeight(prefix + names.conv, shape, (stored,))
        yield Piece(conv, layer, "conv", _write_channels(first, rows.stop - rows.start))
        above, first = above + width, first + rows.stop - rows.start
    for name, attribute in ((names.decay_log, "decay_log"), (names.bias, "bias")):
        vector = NamedWeight(prefix + name, (spec.value_heads,), (values,))
        yield _whole(vector, layer.gates, attribute)


def _write_channels(first: int, count: int) -> Callable[[Any, Any], None]:
    """Fill channels of a convolution [kernel, channels] from [channels, 1, kernel]."""

    def write(storage: Any, source: Any) -> None:
        storage[:, first : first + count].copy_(source.squeeze(1).T)

    return write


def _gated_parts(
    gate_up: Linear, down: Linear, hidden: int, size: int, shard: Shard
) -> dict[str, _LinearPart]:
    """The parts of a gated MLP; size: its inner size on all ranks together."""
    own, each = shard.part(size), size // shard.size
    found = {
        "up": _LinearPart(gate_up, size, hidden, own, first=gate_up.outputs - each),
        "down": _LinearPart(down, hidden, size, columns=own),
    }
    if gate_up.outputs > each:
        found["gate"] = _LinearPart(gate_up, size, hidden, own)
    return found


def _linears(
    prefix: str,
    names: tuple[LinearName, ...],
    parts: dict[str, _LinearPart],
    shard: Shard,
) -> Iterator[Piece]:
    """The pieces of linears; the rows of a tensor are those of its parts, in order."""
    for stem, part_names in names:
        if not parts.keys() & set(part_names):  # of other layers
            continue
        if parts[part_names[0]].block:
            own = [parts[name] for name in part_names]
            yield from _alternating(prefix + stem, own)
            continue
        outputs = sum(parts[name].outputs for name in part_names)
        above = 0
        for name in part_names:
            part = parts[name]
            start, stop, _ = part.rows.indices(part.outputs)
            rows = slice(above + start, above + stop)
            yield from _linear(prefix + stem, part, outputs, rows, shard)
            above += part.outputs


def _linear(
    name: str, part: _LinearPart, outputs: int, rows: slice, shard: Shard
) -> Iterator[Piece]:
    linear, write = part.linear, _write_rows(part.first, rows.stop - rows.start)
    if part.pairs[1]:
        write = _write_pairs(rows.stop - rows.start, *part.pairs)
    weight = _weight(f"{name}.weight", (outputs, part.inputs), (rows, part.columns))
    yield Piece(weight, linear, "weight", write)
    if linear.has_bias:
        if linear.sum_over_ranks and shard.rank:
            write = _write_zeros  # rank 0 alone adds the bias
        yield Piece(NamedWeight(f"{name}.bias", (outputs,), (rows,)), linear, "bias", write)


def _alternating(name: str, parts: list[_LinearPart]) -> Iterator[Piece]:
    """The pieces of a tensor whose parts alternate, a block of each for every head."""
    stride, above = sum(part.block for part in parts), 0
    for part in parts:
        heads, (start, stop, _) = part.outputs // part.block, part.rows.indices(part.outputs)
        rows = slice(start // part.block * stride, stop // part.block * stride)
        linear, write = part.linear, _write_blocks(part, above, stride)
        weight = _weight(f"{name}.weight", (heads * stride, part.inputs), (rows, part.columns))
        yield Piece(weight, linear, "weight", write)
        if linear.has_bias:
            bias = NamedWeight(f"{name}.bias", (heads * stride,), (rows,))
            yield Piece(bias, linear, "bias", write)
        above += part.block


def _write_blocks(part: _LinearPart, above: int, stride: int) -> Callable[[Any, Any], None]:
    start, stop, _ = part.rows.indices(part.outputs)

    def write(storage: Any, source: Any) -> None:
        for head in range((stop - start) // part.block):
            first, from_row = part.first + head * part.block, head * stride + above
            block = source[from_row : from_row + part.block]
            storage[first : first + part.block].copy_(block)

    return write


def _write_rows(first: int, count: int) -> Callable[[Any, Any], None]:
    def write(storage: Any, source: Any) -> None:
        storage[first : first + count].copy_(source)

    return write


def _write_pairs(count: int, group: int, paired: int) -> Callable[[Any, Any], None]:
    """Write rows in the order of `_LinearPart.pairs`."""

    def write(storage: Any, source: Any) -> None:
        for start in range(0, count, group):
            stop, first = start + group, start + group - paired
            storage[start:first].copy_(source[start:first])
            middle = first + paired // 2
            storage[first:middle].copy_(source[first:stop:2])
            storage[middle:stop].copy_(source[first + 1 : stop : 2])

    return write


def _write_zeros(storage: Any, source: Any) -> None:
    storage.zero_()


def _add_experts(
    found: TensorMap, prefix: str, names: ExpertNames, moe: Moe, config: ModelConfig
) -> None:
    assert config.moe is not None  # the config says that the layer is sparse
    hidden, count = config.hidden_size, config.moe.num_experts
    parts = {"router": _LinearPart(moe.router, count, hidden)}
    linears: tuple[LinearName, ...] = ((names.router, ("router",)),)
    if moe.router_spec.has_correction or moe.router_spec.scales_experts:
        found.pieces.append(
            _whole(NamedWeight(prefix + names.correction, (count,)), moe, "correction")
        )
    shared = moe.experts.shared
    if shared is not None:
        size = config.moe.shared_size
        parts |= _gated_parts(shared.gate_up, shared.down, hidden, size, moe.shard)
        linears += names.shared
        if shared.gate is not None:
            parts["shared_gate"] = _LinearPart(shared.gate, 1, hidden)
            linears += ((names.shared_gate, ("shared_gate",)),)
    found.pieces += _linears(prefix, linears, parts, moe.shard)
    for stem, outputs in names.linears:
        target = _ExpertLinear(moe, names, outputs)
        if "{expert}" in stem:
            _add_single_experts(found, prefix + stem, target, count)
        else:
            found.pieces += _stacked_experts(prefix + stem, target, count)


@dataclass(frozen=True)
class _ExpertLinear:
    """One linear of every expert: gate, up, both of them, or down."""

    moe: Moe
    names: ExpertNames
    parts: tuple[str, ...]

    @property
    def attribute(self) -> str:
        """The parameter of `Experts` that it fills, and with "_bias" its bias."""
        return "down" if self.parts == ("down",) else "gate_up"

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of one expert's tensor."""
        experts = self.moe.experts
        if self.attribute == "down":
            return experts.hidden, experts.size
        return len(self.parts) * experts.size, experts.hidden

    def write(self, storage: Any, source: Any) -> None:
        """Fill one expert's rows from its tensor, both [outputs, inputs] or [outputs]."""
        count = len(self.parts)
        size = self.shape[0] // count
        for i, part in enumerate(self.parts):
            first = size if part == "up" else 0
            rows = slice(i * size, (i + 1) * size)
            if self.names.interleaved:
                rows = slice(i, None, count)
            storage[first : first + size].copy_(source[rows])


def _add_single_experts(found: TensorMap, stem: str, target: _ExpertLinear, count: int) -> None:
    """Experts in separate tensors; this rank reads the tensors of its own experts."""
    experts, own, attribute = target.moe.experts, target.moe.shard.part(count), target.attribute
    for expert in range(count):
        name = stem.format(expert=expert)
        tensors = {attribute: _weight(f"{name}.weight", target.shape)}
        if experts.has_bias:
            tensors[f"{attribute}_bias"] = NamedWeight(f"{name}.bias", target.shape[:1])
        if not own.start <= expert < own.stop:
            found.elsewhere += tensors.values()
            continue
        write = _write_expert(target, expert - own.start)
        found.pieces += [Piece(tensors[key], experts, key, write) for key in tensors]


def _write_expert(target: _ExpertLinear, expert: int) -> Callable[[Any, Any], None]:
    def write(storage: Any, source: Any) -> None:
        target.write(storage[expert], source)

    return write


def _stacked_experts(stem: str, target: _ExpertLinear, count: int) -> Iterator[Piece]:
    """All experts in one tensor; this rank reads its own experts."""
    experts, own, attribute = target.moe.experts, target.moe.shard.part(count), target.attribute

    def write(storage: Any, source: Any) -> None:
        for expert in range(experts.count):
            target.write(storage[expert], source[expert])

    shape, transposed = (count, *target.shape), target.names.transposed
    names = target.names
    weight = NamedWeight(
        stem + names.weight_suffix, shape, (own,), module=stem, transposed=transposed
    )
    yield Piece(weight, experts, attribute, write)
    if experts.has_bias:
        bias = NamedWeight(stem + names.bias_suffix, shape[:2], (own,))
        yield Piece(bias, experts, f"{attribute}_bias", write)
