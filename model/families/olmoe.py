"""OLMoE: experts in every layer, and norms over all query heads and all key heads at once."""

from model.families.config_keys.keys import Keys
from model.families.config_keys.moe_keys import softmax_moe
from model.families.family import Family, attention_biases, layers


def _fields(keys: Keys) -> dict[str, object]:
    keys.one_of("clip_qkv", None)
    experts, size = keys.integer("num_experts"), keys.integer("intermediate_size")
    return attention_biases(keys) | {
        "layers": layers(keys, sparse=True),
        "qk_norm": True,
        "whole_qk_norm": True,
        "moe": softmax_moe(keys, experts, size, keys.boolean("norm_topk_prob")),
    }


FAMILY = Family(
    {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 50_279,
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    _fields,
    aliases={"num_local_experts": "num_experts"},
)
