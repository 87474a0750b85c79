"""Qwen3 with experts in some or all layers."""

from model.config import LayerConfig
from model.families.config_keys.keys import Keys
from model.families.config_keys.moe_keys import by_sparse_step, softmax_moe
from model.families.family import Family, attention_biases, layers, qwen_window


def _fields(keys: Keys) -> dict[str, object]:
    experts, size = keys.integer("num_experts"), keys.integer("moe_intermediate_size")
    return attention_biases(keys) | {
        "layers": _layers(keys),
        "qk_norm": True,
        "moe": softmax_moe(keys, experts, size, keys.boolean("norm_topk_prob")),
    }


def _layers(keys: Keys) -> tuple[LayerConfig, ...]:
    window = qwen_window(keys)
    found = layers(keys, window)
    if any(layer.window != window for layer in found):
        raise keys.fail("'layer_types' must be the same for all layers, as 'use_sliding_window'")
    return by_sparse_step(keys, found)


FAMILY = Family(
    {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": None,  # every layer has the window, if it is used
        "layer_types": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    _fields,
    neutral={"use_qk_norm": True},
    aliases={"num_local_experts": "num_experts"},
)
