"""GLM-4 with experts (GLM-4.5 to 4.7): DeepSeek-V3's router and shared expert, partial rotation."""

from model.families.config_keys.keys import Keys
from model.families.config_keys.moe_keys import after_first_dense, deepseek_moe
from model.families.family import Family, layers


def _fields(keys: Keys) -> dict[str, object]:
    return {
        "layers": after_first_dense(keys, layers(keys)),
        "qkv_bias": keys.boolean("attention_bias"),
        "qk_norm": keys.boolean("use_qk_norm"),
        "moe": deepseek_moe(keys),
        "mtp_layers": keys.integer("num_nextn_predict_layers", minimum=0),
    }


FAMILY = Family(
    {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "use_qk_norm": False,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 1,
    },
    _fields,
    neutral={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    aliases={
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
    partial_rotary=True,
)
