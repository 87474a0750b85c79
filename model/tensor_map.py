"""Which tensors of a checkpoint fill which parameters of the decoder.

A parameter may consist of several tensors (q, k and v of one fused weight, the experts of a
stack), and a tensor may contain several parts of a parameter (a fused gate and up). Each pair of
a tensor and a part is a `Piece`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from model.attention import Attention
from model.config import ModelConfig
from model.families.tensor_names import ExpertNames, LinearName, TensorNames
from model.formats.format import Part
from model.latent_attention import LatentAttention
from model.mlp import Moe
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
        _whole(NamedWeight(names.final_norm, table[1:]), model.final_norm),
    ]
    if not config.tie_word_embeddings:
        found.pieces.append(_whole(_weight(names.head, table, own), model.head))
    for i, layer in enumerate(model.layers):
        prefix = names.layer.format(layer=i)
        found.pieces += _layer_vectors(prefix, names, layer, config, shard)
        found.pieces += _attention(prefix, names.attention, layer.attention, config, shard)
        if isinstance(layer.mlp, Moe):
            _add_experts(found, prefix, names.experts, layer.mlp, config)
        else:
            mlp, sizes = layer.mlp, (config.hidden_size, config.intermediate_size)
            parts = _gated_parts(mlp.gate_up, mlp.down, *sizes, shard)
            found.pieces += _linears(prefix, names.mlp, parts, shard)
    return found


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
    attention = layer.attention
    for name, norm in (
        (names.attention_norm, attention.norm),
        (names.mlp_norm, layer.mlp.norm),
        (names.attention_post_norm, attention.post_norm),
        (names.mlp_post_norm, getattr(layer.mlp, "post_norm", None)),
        (names.q_norm, attention.heads.q_norm),
        (names.k_norm, attention.heads.k_norm),
        (names.query_norm, getattr(attention, "query_norm", None)),
        (names.latent_norm, getattr(attention, "latent_norm", None)),
    ):
        if norm is not None and not norm.is_identity:
            yield _whole(NamedWeight(prefix + name, (norm.size,)), norm)
    if attention.has_sinks and isinstance(attention, Attention):
        heads = shard.part(config.num_heads)
        sinks = NamedWeight(prefix + names.sinks, (config.num_heads,), (heads,))
        yield _whole(sinks, attention, "sinks")


def _attention(
    prefix: str,
    names: tuple[LinearName, ...],
    attention: Attention | LatentAttention,
    config: ModelConfig,
    shard: Shard,
) -> Iterator[Piece]:
    if isinstance(attention, Attention):
        yield from _linears(prefix, names, _attention_parts(attention, config, shard), shard)
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
    attention: Attention, config: ModelConfig, shard: Shard
) -> dict[str, _LinearPart]:
    hidden, head_dim, own = config.hidden_size, config.head_dim, attention.heads
    q_rows = _of_heads(shard.part(config.num_heads), head_dim)
    kv_rows = _of_heads(shard.kv_part(config.num_kv_heads), head_dim)
    q_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
    first_k = own.heads * head_dim
    first_v = first_k + own.kv_heads * head_dim
    return {
        "q": _LinearPart(attention.qkv, q_width, hidden, q_rows),
        "k": _LinearPart(attention.qkv, kv_width, hidden, kv_rows, first=first_k),
        "v": _LinearPart(attention.qkv, kv_width, hidden, kv_rows, first=first_v),
        "o": _LinearPart(attention.out, hidden, q_width, columns=q_rows),
    }


def _of_heads(heads: slice, head_dim: int) -> slice:
    return slice(heads.start * head_dim, heads.stop * head_dim)


def _gated_parts(
    gate_up: Linear, down: Linear, hidden: int, size: int, shard: Shard
) -> dict[str, _LinearPart]:
    """The parts of a gated MLP; size: its inner size on all ranks together."""
    own = shard.part(size)
    return {
        "gate": _LinearPart(gate_up, size, hidden, own),
        "up": _LinearPart(gate_up, size, hidden, own, first=size // shard.size),
        "down": _LinearPart(down, hidden, size, columns=own),
    }


def _linears(
    prefix: str,
    names: tuple[LinearName, ...],
    parts: dict[str, _LinearPart],
    shard: Shard,
) -> Iterator[Piece]:
    """The pieces of linears; the rows of a linear are those of its parts, in order."""
    for stem, part_names in names:
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
    if moe.router_spec.has_correction:
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
    for stem, own in names.linears:
        target = _ExpertLinear(moe, names, own)
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
