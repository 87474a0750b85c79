"""DeepSeek-V2 and V2-Lite: latent attention, experts by a softmax, perhaps in groups."""

from dataclasses import replace

from model.config import MoeConfig
from model.families.config_keys.keys import Keys
from model.families.config_keys.latent_keys import LATENT_DEFAULTS, LATENT_NAMES, latent_fields
from model.families.config_keys.moe_keys import after_first_dense, expert_groups, softmax_moe
from model.families.family import Family, layers
from model.families.tensor_names import TensorNames


def _fields(keys: Keys) -> dict[str, object]:
    keys.one_of("mlp_bias", False)
    keys.one_of("norm_topk_prob", False)
    return latent_fields(keys, interleaved=True) | {
        "layers": after_first_dense(keys, layers(keys)),
        "moe": _moe(keys),
    }


def _moe(keys: Keys) -> MoeConfig:
    experts, size = keys.integer("n_routed_experts"), keys.integer("moe_intermediate_size")
    moe = softmax_moe(keys, experts, size, normalize=False)
    groups = None
    if keys.one_of("topk_method", "greedy", "group_limited_greedy") != "greedy":
        groups = expert_groups(keys, experts, moe.router.top_k, 1)
    router = replace(moe.router, groups=groups, scale=keys.number("routed_scaling_factor"))
    shared = size * keys.integer("n_shared_experts", minimum=0)
    return replace(moe, router=router, shared_size=shared)


FAMILY = Family(
    {
        **LATENT_DEFAULTS,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 2,
        "mlp_bias": False,
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "n_group": None,
        "topk_group": None,
        "topk_method": "greedy",
        "num_experts_per_tok": None,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    _fields,
    TensorNames(attention=LATENT_NAMES),
    neutral={"moe_layer_freq": 1, "scoring_func": "softmax"},
    aliases={"num_experts": "n_routed_experts"},
)
