"""Mixtral: Mistral with experts."""

from model.families.config_keys.keys import Keys
from model.families.config_keys.moe_keys import softmax_moe
from model.families.family import Family, layers
from model.families.tensor_names import ExpertNames, TensorNames

BLOCK_SPARSE = ExpertNames(
    router="block_sparse_moe.gate",
    correction="block_sparse_moe.e_score_correction_bias",
    linears=(
        ("block_sparse_moe.experts.{expert}.w1", ("gate",)),
        ("block_sparse_moe.experts.{expert}.w3", ("up",)),
        ("block_sparse_moe.experts.{expert}.w2", ("down",)),
    ),
)
"""The names of Mixtral's experts, and of a correction that only other families have."""


def _fields(keys: Keys) -> dict[str, object]:
    experts, size = keys.integer("num_local_experts"), keys.integer("intermediate_size")
    return {
        "layers": layers(keys, keys.optional_integer("sliding_window"), sparse=True),
        "moe": softmax_moe(keys, experts, size, normalize=True),
    }


FAMILY = Family(
    {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "rope_theta": 1e6,
        "sliding_window": None,
        "layer_types": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    _fields,
    TensorNames(experts=BLOCK_SPARSE),
    neutral={"norm_topk_prob": True},  # the weights of the chosen experts always sum to 1
    aliases={"num_experts": "num_local_experts"},
)
