"""Mistral: Llama with a sliding window."""

from model.families.config_keys.keys import Keys
from model.families.family import Family, layers


def _fields(keys: Keys) -> dict[str, object]:
    return {"layers": layers(keys, keys.optional_integer("sliding_window"))}


FAMILY = Family(
    {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 2,
        "sliding_window": 4096,
        "layer_types": None,
    },
    _fields,
)
