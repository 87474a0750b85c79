"""OLMo 3: OLMo 2 with windows in three of four layers, whose rotation is never scaled."""

from dataclasses import replace

from model.families.config_keys.keys import Keys
from model.families.config_keys.rope_keys import ropes_by_layer_type
from model.families.family import Family, layers
from model.families.olmo2 import POST_NORMS, olmo_fields


def _fields(keys: Keys) -> dict[str, object]:
    types = keys.get("layer_types")

    def is_local(layer: int) -> bool:  # also without a window the rotary embedding differs
        return types[layer] == "sliding_attention" if types else (layer + 1) % 4 != 0

    found = layers(keys, keys.optional_integer("sliding_window"), is_local)
    whole, local, rotary_dim = ropes_by_layer_type(keys, keys.number("rope_theta"))
    return olmo_fields(keys) | {
        "layers": tuple(
            replace(layer, rope=local) if is_local(i) else layer for i, layer in enumerate(found)
        ),
        "rope": whole,
        "rotary_dim": rotary_dim,
    }


FAMILY = Family(
    {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 50_279,
        "rope_theta": 500_000.0,
        "attention_bias": False,
        "sliding_window": 4096,
        "layer_types": None,
    },
    _fields,
    POST_NORMS,
)
