"""Granite 3: Llama with four multipliers."""

from model.families.config_keys.keys import Keys
from model.families.family import Family, attention_biases


def _fields(keys: Keys) -> dict[str, object]:
    return attention_biases(keys) | {
        "mlp_bias": keys.boolean("mlp_bias"),
        "embedding_scale": keys.number("embedding_multiplier"),
        "residual_scale": keys.number("residual_multiplier"),
        "attention_scale": keys.number("attention_multiplier"),
        "logits_scale": 1 / keys.number("logits_scaling"),
    }


FAMILY = Family(
    {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    _fields,
)
