"""The pieces of attention and of recurrent layers."""

from collections.abc import Callable, Iterator
from typing import Any

from model.config import ModelConfig
from model.families.tensor_names import DeltaRuleNames, LinearName
from model.layers.attention import Attention
from model.layers.delta_rule import DeltaRule
from model.layers.latent_attention import LatentAttention
from model.sharding import Shard
from model.tensors.linears import LinearPart, linear_pieces, of_heads
from model.tensors.pieces import NamedWeight, Piece, named_weight, whole


def attention_pieces(
    prefix: str,
    names: tuple[LinearName, ...],
    attention: Attention | LatentAttention,
    config: ModelConfig,
    kv_heads: int,
    shard: Shard,
) -> Iterator[Piece]:
    """The pieces of a layer's linears; kv_heads: those of all ranks."""
    if isinstance(attention, Attention):
        parts = _attention_parts(attention, config, kv_heads, shard)
        yield from linear_pieces(prefix, names, parts, shard)
        return
    parts = _latent_parts(attention, config, shard)
    stored = tuple(name for name in names if set(name[1]) <= parts.keys())
    yield from linear_pieces(prefix, stored, parts, shard)
    (stem,) = (stem for stem, own in names if own == ("kv",))
    yield from _head_linears(f"{prefix}{stem}.weight", attention, config, shard)


def _attention_parts(
    attention: Attention, config: ModelConfig, kv_heads: int, shard: Shard
) -> dict[str, LinearPart]:
    hidden, own = config.hidden_size, attention.heads
    head_dim = own.head_dim
    q_rows = of_heads(shard.part(config.num_heads), head_dim)
    kv_rows = of_heads(shard.kv_part(kv_heads), head_dim)
    q_width, kv_width = config.num_heads * head_dim, kv_heads * head_dim
    first_k = own.heads * head_dim
    first_v = first_k + own.kv_heads * head_dim
    block = head_dim if attention.gate is not None else 0
    found = {
        "q": LinearPart(attention.qkv, q_width, hidden, q_rows, block=block),
        "o": LinearPart(attention.out, hidden, q_width, columns=q_rows),
    }
    if attention.gate is not None:
        found["gate"] = LinearPart(attention.gate, q_width, hidden, q_rows, block=block)
    for part, first in zip("kv", (first_k, first_v), strict=True):
        if own.kv_heads and (part == "k" or not own.values_are_keys):
            found[part] = LinearPart(attention.qkv, kv_width, hidden, kv_rows, first=first)
    return found


def _latent_parts(
    attention: LatentAttention, config: ModelConfig, shard: Shard
) -> dict[str, LinearPart]:
    latent, hidden, rotary = config.latent, config.hidden_size, config.rotary_dim
    assert latent is not None  # the model has such attention
    head_dim, heads = latent.plain_dim + rotary, shard.part(config.num_heads)
    pairs = rotary if latent.has_interleaved_pairs else 0
    query = "direct_q" if attention.query_down is None else "q"
    parts = {
        query: LinearPart(
            attention.query,
            config.num_heads * head_dim,
            attention.query.inputs,
            of_heads(heads, head_dim),
            pairs=(head_dim, pairs),
        ),
        "kv_down": LinearPart(
            attention.latent, config.head_dim, hidden, pairs=(config.head_dim, pairs)
        ),
        "o": LinearPart(
            attention.out,
            hidden,
            config.num_heads * latent.value_dim,
            columns=of_heads(heads, latent.value_dim),
        ),
    }
    if attention.query_down is not None:
        parts["q_down"] = LinearPart(attention.query_down, attention.query_down.outputs, hidden)
    return parts


def _head_linears(
    name: str, attention: LatentAttention, config: ModelConfig, shard: Shard
) -> Iterator[Piece]:
    """The pieces of the projection from latents to each head's keys, transposed, and values."""
    absorb, expand = attention.absorb, attention.expand
    keys, rows = absorb.inputs, absorb.inputs + expand.outputs
    own = of_heads(shard.part(config.num_heads), rows)
    weight = named_weight(name, (config.num_heads * rows, expand.inputs), (own,))

    def write_keys(storage: Any, source: Any) -> None:
        for head in range(absorb.heads):
            storage[head].copy_(source[head * rows : head * rows + keys].T)

    def write_values(storage: Any, source: Any) -> None:
        for head in range(expand.heads):
            storage[head].copy_(source[head * rows + keys : (head + 1) * rows])

    yield Piece(weight, absorb, "weight", write_keys)
    yield Piece(weight, expand, "weight", write_values)


def delta_rule_pieces(
    prefix: str, names: DeltaRuleNames, layer: DeltaRule, config: ModelConfig, shard: Shard
) -> Iterator[Piece]:
    """The pieces of a recurrent layer: linears, convolution and gates."""
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
    parts, first = dict[str, LinearPart](), 0
    for name, (heads, of_rank, size) in widths.items():
        linear = layer.gates_in if size == 1 else layer.qkv_gate
        first = 0 if name == "b" else first
        block = size * (heads // spec.key_heads) if names.interleaved else 0
        rows = of_heads(of_rank, size)
        parts[name] = LinearPart(linear, heads * size, hidden, rows, first=first, block=block)
        first += rows.stop - rows.start
    of_values = of_heads(values, spec.value_dim)
    parts["out"] = LinearPart(
        layer.out, hidden, spec.value_heads * spec.value_dim, columns=of_values
    )
    yield from linear_pieces(prefix, names.linears, parts, shard)
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
        yield whole(vector, layer.gates, attribute)


def _write_channels(first: int, count: int) -> Callable[[Any, Any], None]:
    """Fill channels of a convolution [kernel, channels] from [channels, 1, kernel]."""

    def write(storage: Any, source: Any) -> None:
        storage[:, first : first + count].copy_(source.squeeze(1).T)

    return write
