"""Llama 1 to 3, and models that use its architecture."""

from model.families.config_keys.keys import Keys
from model.families.family import Family, attention_biases


def _fields(keys: Keys) -> dict[str, object]:
    return attention_biases(keys) | {"mlp_bias": keys.boolean("mlp_bias")}


FAMILY = Family(
    {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
    },
    _fields,
)
