"""MiniMax-M2: a router of sigmoids with a correction, norms over all heads, partial rotation."""

from model.config import MoeConfig
from model.families.config_keys.keys import Keys
from model.families.config_keys.moe_keys import top_k
from model.families.config_keys.rope_keys import read_rope
from model.families.family import Family, layers
from model.families.mixtral import BLOCK_SPARSE
from model.families.tensor_names import TensorNames
from model.ops.specs import RouterSpec


def _fields(keys: Keys) -> dict[str, object]:
    keys.one_of("sliding_window", None)
    experts = keys.integer("num_local_experts")
    rotary_dim, head_dim = keys.optional_integer("rotary_dim"), keys.integer("head_dim")
    if rotary_dim is not None:
        share = {"partial_rotary_factor": rotary_dim / head_dim}
        keys = Keys(keys.source, share | keys.values, keys.defaults)
    rope, rotary_dim = read_rope(keys, head_dim, partial=True, aliases={})
    return {
        "layers": layers(keys, sparse=True),
        "qk_norm": True,
        "whole_qk_norm": True,
        "rope": rope,
        "rotary_dim": rotary_dim,
        "moe": MoeConfig(
            num_experts=experts,
            intermediate_size=keys.integer("intermediate_size"),
            router=RouterSpec(
                top_k(keys, experts),
                softmax_after_top_k=False,
                normalize=True,
                sigmoid=True,
                has_correction=True,
            ),
            biases=False,
        ),
    }


FAMILY = Family(
    {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 196_608,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 200_020,
        "rope_theta": 5e6,
        "rotary_dim": None,
        "sliding_window": None,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
    },
    _fields,
    TensorNames(experts=BLOCK_SPARSE),
    neutral={
        "qk_norm_type": "per_layer",
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "use_qk_norm": True,
        "use_routing_bias": True,
    },
    aliases={"num_experts": "num_local_experts"},
    partial_rotary=True,
)
