"""GLM-4.7-Flash: DeepSeek-V3's attention and experts with other sizes."""

from dataclasses import replace

from model.config import LayerConfig
from model.families.config_keys.keys import Keys
from model.families.config_keys.latent_keys import LATENT_DEFAULTS, LATENT_NAMES, latent_fields
from model.families.config_keys.moe_keys import after_first_dense, deepseek_moe
from model.families.family import Family, layers
from model.families.tensor_names import TensorNames


def _fields(keys: Keys) -> dict[str, object]:
    interleaved = keys.boolean("rope_interleave")
    return latent_fields(keys, interleaved=interleaved) | {
        "layers": _layers(keys),
        "moe": deepseek_moe(keys),
        "mtp_layers": keys.integer("num_nextn_predict_layers", minimum=0),
    }


def _layers(keys: Keys) -> tuple[LayerConfig, ...]:
    found, kinds = layers(keys), keys.get("mlp_layer_types")
    if kinds is None:
        return after_first_dense(keys, found)
    if not isinstance(kinds, list) or len(kinds) != len(found):
        raise keys.fail(f"'mlp_layer_types' must list one type for each of the {len(found)} layers")
    if not all(kind in ("dense", "sparse") for kind in kinds):
        raise keys.fail(f"'mlp_layer_types' must be dense or sparse, not {kinds!r:.60}")
    return tuple(
        replace(layer, sparse=kind == "sparse") for layer, kind in zip(found, kinds, strict=True)
    )


FAMILY = Family(
    {
        **LATENT_DEFAULTS,
        "max_position_embeddings": 202_752,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 1,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "rope_interleave": True,
        "mlp_layer_types": None,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "num_nextn_predict_layers": 0,
    },
    _fields,
    TensorNames(attention=LATENT_NAMES),
    neutral={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    aliases={"num_local_experts": "n_routed_experts"},
)
