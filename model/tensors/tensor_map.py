"""The map of a whole checkpoint: every parameter of a rank's decoder."""

from collections.abc import Iterator

from model.config import ModelConfig
from model.families.tensor_names import PerLayerNames, TensorNames
from model.layers.attention import Attention
from model.layers.delta_rule import DeltaRule
from model.layers.mlp import Mlp, MlpBesideExperts, Moe, PerLayerInputs, PerLayerMlp
from model.sharding import Shard
from model.tensors.attention import attention_pieces, delta_rule_pieces
from model.tensors.experts import add_experts
from model.tensors.linears import LinearPart, gated_parts, linear_pieces
from model.tensors.pieces import NamedWeight, Piece, TensorMap, named_weight, whole
from model.transformer import Layer, Transformer


def tensor_map(model: Transformer, names: TensorNames) -> TensorMap:
    """Map the tensors of a Hugging Face checkpoint to the parameters of this rank.

    names: the family's, or those of a checkpoint that stores only one of two tied tensors.
    """
    config, shard, found = model.config, model.shard, TensorMap()
    table, own = (config.vocab_size, config.hidden_size), (shard.vocab_part(config.vocab_size),)
    found.pieces += [
        whole(named_weight(names.embedding, table, own, is_embedding=True), model, "embedding"),
    ]
    if model.final_norm.is_stored:
        found.pieces.append(whole(NamedWeight(names.final_norm, table[1:]), model.final_norm))
    if not config.tie_word_embeddings:
        found.pieces.append(whole(named_weight(names.head, table, own), model.head))
    for i, layer in enumerate(model.layers):
        prefix = names.layer.format(layer=i)
        found.pieces += _layer_vectors(prefix, names, layer, config, shard)
        attention = layer.attention
        if isinstance(attention, DeltaRule):
            found.pieces += delta_rule_pieces(prefix, names.delta_rule, attention, config, shard)
        else:
            kv_heads = config.heads(config.layers[i]).num_kv_heads
            found.pieces += attention_pieces(
                prefix, names.attention, attention, config, kv_heads, shard
            )
        mlp = layer.mlp.mlp if isinstance(layer.mlp, MlpBesideExperts) else layer.mlp
        moe = layer.mlp.moe if isinstance(layer.mlp, MlpBesideExperts) else layer.mlp
        if isinstance(moe, Moe):
            add_experts(found, prefix, names.experts, moe, config)
        if isinstance(mlp, Mlp):
            size = config.mlp_size(config.layers[i])
            parts = gated_parts(mlp.gate_up, mlp.down, config.hidden_size, size, shard)
            found.pieces += linear_pieces(prefix, names.mlp, parts, shard)
        if layer.per_layer is not None:
            found.pieces += _per_layer_mlp(prefix, names.per_layer, layer.per_layer, shard)
    if model.per_layer is not None:
        found.pieces += _per_layer_inputs(names.per_layer, model.per_layer, config, shard)
    return found


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
            yield whole(NamedWeight(prefix + name, (norm.size,)), norm)
    if layer.has_scalar:
        yield whole(NamedWeight(prefix + names.layer_scalar, (1,)), layer, "scalar")
    if isinstance(attention, Attention) and attention.has_sinks:
        heads = shard.part(config.num_heads)
        sinks = NamedWeight(prefix + names.sinks, (config.num_heads,), (heads,))
        yield whole(sinks, attention, "sinks")


def _per_layer_mlp(
    prefix: str, names: PerLayerNames, own: PerLayerMlp, shard: Shard
) -> Iterator[Piece]:
    hidden, size = own.gate.inputs, own.gate.outputs
    parts = {
        "gate": LinearPart(own.gate, size, hidden),
        "down": LinearPart(own.down, hidden, size),
    }
    yield from linear_pieces(
        prefix, ((names.gate, ("gate",)), (names.down, ("down",))), parts, shard
    )


def _per_layer_inputs(
    names: PerLayerNames, own: PerLayerInputs, config: ModelConfig, shard: Shard
) -> Iterator[Piece]:
    projection = own.projection
    shape = config.vocab_size, projection.outputs
    table = named_weight(names.embedding, shape, (own.tokens,), is_embedding=True)
    yield whole(table, own, "table")
    yield whole(NamedWeight(names.norm, (own.norm.size,)), own.norm)
    part = LinearPart(projection, projection.outputs, projection.inputs)
    yield from linear_pieces("", ((names.projection, ("all",)),), {"all": part}, shard)
