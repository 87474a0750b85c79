"""Qwen3: Llama with norms of the query and key heads."""

from model.families.config_keys.keys import Keys
from model.families.family import Family, attention_biases, qwen_layers


def _fields(keys: Keys) -> dict[str, object]:
    return attention_biases(keys) | {"layers": qwen_layers(keys), "qk_norm": True}


FAMILY = Family(
    {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "head_dim": 128,
        "attention_bias": False,
    },
    _fields,
    neutral={"use_qk_norm": True},
)
