"""Llama 2 and 3, and models that use its architecture."""

from model.families.family import Family, attention_biases
from model.families.keys import Keys


def _fields(keys: Keys) -> dict[str, object]:
    return attention_biases(keys) | {"mlp_bias": keys.boolean("mlp_bias", False)}


FAMILY = Family("attention_bias mlp_bias", _fields)
