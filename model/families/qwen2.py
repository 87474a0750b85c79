"""Qwen2 and Qwen2.5: Llama with biases of q, k and v."""

from model.families.family import Family, qwen_layers
from model.families.keys import Keys


def _fields(keys: Keys) -> dict[str, object]:
    return {"layers": qwen_layers(keys), "qkv_bias": True}


FAMILY = Family("use_sliding_window sliding_window max_window_layers layer_types", _fields)
