"""Granite 3: Llama with four multipliers."""

from model.families.family import Family, attention_biases
from model.families.keys import Keys


def _fields(keys: Keys) -> dict[str, object]:
    return attention_biases(keys) | {
        "mlp_bias": keys.boolean("mlp_bias", False),
        "embedding_scale": keys.number("embedding_multiplier", 1.0),
        "residual_scale": keys.number("residual_multiplier", 1.0),
        "attention_scale": keys.number("attention_multiplier", 1.0),
        "logits_scale": 1 / keys.number("logits_scaling", 1.0),
    }


FAMILY = Family(
    "attention_bias mlp_bias embedding_multiplier residual_multiplier attention_multiplier"
    " logits_scaling",
    _fields,
)
