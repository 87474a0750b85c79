"""DeepSeek-V3: latent attention, experts in groups beside a shared one."""

from model.families.config_keys.keys import Keys
from model.families.config_keys.latent_keys import LATENT_DEFAULTS, LATENT_NAMES, latent_fields
from model.families.config_keys.moe_keys import after_first_dense, deepseek_moe
from model.families.family import Family, layers
from model.families.tensor_names import TensorNames


def _fields(keys: Keys) -> dict[str, object]:
    interleaved = keys.boolean("rope_interleave")
    return latent_fields(keys, interleaved=interleaved) | {
        "layers": after_first_dense(keys, layers(keys)),
        "moe": deepseek_moe(keys),
        "mtp_layers": keys.integer("num_nextn_predict_layers", minimum=0),
    }


FAMILY = Family(
    {
        **LATENT_DEFAULTS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 1,
        "rope_interleave": True,
        "first_k_dense_replace": 3,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    },
    _fields,
    TensorNames(attention=LATENT_NAMES),
    neutral={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    aliases={
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
)
