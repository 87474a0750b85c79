"""Qwen3 with experts in some or all layers."""

from model.config import LayerConfig
from model.families.family import Family, attention_biases, softmax_moe
from model.families.keys import Keys


def _fields(keys: Keys) -> dict[str, object]:
    experts = keys.integer("num_experts", keys.get("num_local_experts"))
    size = keys.integer("moe_intermediate_size")
    normalize = keys.boolean("norm_topk_prob", False)
    return attention_biases(keys) | {
        "layers": _layers(keys),
        "qk_norm": True,
        "moe": softmax_moe(keys, experts, size, normalize),
    }


def _layers(keys: Keys) -> tuple[LayerConfig, ...]:
    step, dense = keys.integer("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    is_used = keys.boolean("use_sliding_window", False)
    window = keys.optional_integer("sliding_window") if is_used else None
    return tuple(
        LayerConfig(window, sparse=layer not in dense and (layer + 1) % step == 0)
        for layer in range(keys.integer("num_hidden_layers"))
    )


FAMILY = Family(
    "attention_bias decoder_sparse_step layer_types max_window_layers mlp_only_layers"
    " moe_intermediate_size norm_topk_prob num_experts num_experts_per_tok num_local_experts"
    " sliding_window use_sliding_window",
    _fields,
)
