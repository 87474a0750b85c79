"""Seed-OSS: Llama with biases of q, k and v, and with or without one of the output."""

from model.families.config_keys.keys import Keys
from model.families.family import Family


def _fields(keys: Keys) -> dict[str, object]:
    return {
        "qkv_bias": keys.boolean("attention_bias"),
        "o_bias": keys.boolean("attention_out_bias"),
        "mlp_bias": keys.boolean("mlp_bias"),
    }


FAMILY = Family(
    {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524_288,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 2,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    _fields,
)
