"""Qwen2 and Qwen2.5: Llama with biases of q, k and v."""

from model.families.config_keys.keys import Keys
from model.families.family import Family, qwen_layers


def _fields(keys: Keys) -> dict[str, object]:
    return {"layers": qwen_layers(keys), "qkv_bias": True}


FAMILY = Family(
    {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    _fields,
    neutral={"qkv_bias": True},
)
