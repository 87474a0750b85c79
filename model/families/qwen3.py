"""Qwen3: Llama with norms of the query and key heads."""

from model.families.family import Family, attention_biases, qwen_layers
from model.families.keys import Keys


def _fields(keys: Keys) -> dict[str, object]:
    return attention_biases(keys) | {"layers": qwen_layers(keys), "qk_norm": True}


FAMILY = Family(
    "attention_bias use_sliding_window sliding_window max_window_layers layer_types",
    _fields,
    head_dim=128,
)
