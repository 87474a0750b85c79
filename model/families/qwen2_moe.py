"""Qwen2 with experts, and one that all tokens share, in some or all layers."""

from dataclasses import replace

from model.families.config_keys.keys import Keys
from model.families.config_keys.moe_keys import by_sparse_step, softmax_moe
from model.families.family import Family, layers, qwen_window
from model.families.tensor_names import ExpertNames, TensorNames

GATED_SHARED_EXPERT = ExpertNames(
    shared=(
        ("mlp.shared_expert.gate_proj", ("gate",)),
        ("mlp.shared_expert.up_proj", ("up",)),
        ("mlp.shared_expert.down_proj", ("down",)),
    )
)
"""The names of experts beside one whose result is multiplied by a learned sigmoid."""


def _fields(keys: Keys) -> dict[str, object]:
    experts, size = keys.integer("num_experts"), keys.integer("moe_intermediate_size")
    moe = softmax_moe(keys, experts, size, keys.boolean("norm_topk_prob"))
    shared = keys.integer("shared_expert_intermediate_size")
    last = keys.integer("max_window_layers", minimum=0)
    found = layers(keys, qwen_window(keys), lambda i: i % 2 == 0 and i < last)
    return {
        "qkv_bias": keys.boolean("qkv_bias"),
        "layers": by_sparse_step(keys, found),
        "moe": replace(moe, shared_size=shared, shared_gate=True),
    }


FAMILY = Family(
    {
        "num_key_value_heads": 16,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
    },
    _fields,
    TensorNames(experts=GATED_SHARED_EXPERT),
)
