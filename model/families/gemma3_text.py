"""Gemma 3: Gemma 2 with QK norms, more layers with windows, and rotary embeddings by layer."""

from dataclasses import replace
from typing import Any

from model.families.config_keys.keys import Keys
from model.families.config_keys.rope_keys import ropes_by_layer_type
from model.families.family import Family
from model.families.gemma2 import ACTIVATIONS, GEMMA, NAMES, gemma_fields


def _fields(keys: Keys) -> dict[str, Any]:
    pattern = keys.integer("sliding_window_pattern")
    types = keys.get("layer_types")

    def is_sliding(layer: int) -> bool:  # also without a window the rotary embedding differs
        return types[layer] == "sliding_attention" if types else (layer + 1) % pattern != 0

    found = gemma_fields(keys, is_sliding)
    rope, local, rotary_dim = ropes_by_layer_type(keys, keys.number("rope_local_base_freq"))
    found["layers"] = tuple(
        replace(layer, rope=local) if is_sliding(i) else layer
        for i, layer in enumerate(found["layers"])
    )
    return found | {"qk_norm": True, "rope": rope, "rotary_dim": rotary_dim}


FAMILY = Family(
    {
        **GEMMA,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
    _fields,
    NAMES,
    aliases={"hidden_activation": "hidden_act"},
    activations=ACTIVATIONS,
    norm_offset=1.0,
)
