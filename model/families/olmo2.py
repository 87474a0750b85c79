"""OLMo 2: norms after attention and MLP instead of before, and over all heads at once."""

from model.families.config_keys.keys import Keys
from model.families.family import Family, attention_biases
from model.families.tensor_names import TensorNames

POST_NORMS = TensorNames(
    attention_post_norm="post_attention_layernorm.weight",
    mlp_post_norm="post_feedforward_layernorm.weight",
)
"""The names of a family whose layers have norms only of what they add to the residual stream."""


def olmo_fields(keys: Keys) -> dict[str, object]:
    """The fields that OLMo 2 and 3 share."""
    return attention_biases(keys) | {
        "pre_norms": False,
        "post_norms": True,
        "qk_norm": True,
        "whole_qk_norm": True,
    }


FAMILY = Family(
    {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 50_279,
        "attention_bias": False,
    },
    olmo_fields,
    POST_NORMS,
)
