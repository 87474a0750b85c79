"""Gemma 3: Gemma 2 with QK norms, more layers with windows, and rotary embeddings by layer."""

from dataclasses import replace
from typing import Any

from model.config import RopeConfig
from model.families.config_keys.keys import Keys
from model.families.config_keys.rope_keys import read_rope
from model.families.family import Family
from model.families.gemma2 import ACTIVATIONS, GEMMA, NAMES, gemma_fields


def _fields(keys: Keys) -> dict[str, Any]:
    pattern = keys.integer("sliding_window_pattern")
    types = keys.get("layer_types")

    def is_sliding(layer: int) -> bool:  # also without a window the rotary embedding differs
        return types[layer] == "sliding_attention" if types else (layer + 1) % pattern != 0

    found = gemma_fields(keys, is_sliding)
    rope, local, rotary_dim = _ropes(keys)
    found["layers"] = tuple(
        replace(layer, rope=local) if is_sliding(i) else layer
        for i, layer in enumerate(found["layers"])
    )
    return found | {"qk_norm": True, "rope": rope, "rotary_dim": rotary_dim}


def _ropes(keys: Keys) -> tuple[RopeConfig, RopeConfig, int]:
    """The rotary embeddings of layers without and with a window, and the values they rotate."""
    head_dim, given = keys.integer("head_dim"), keys.get("rope_parameters") or {}
    if not isinstance(given, dict) or not all(isinstance(v, dict) for v in given.values()):
        raise keys.fail(f"'rope_parameters' must have parameters by layer type, not {given!r:.60}")
    scaling = keys.get("rope_scaling", {})
    if not isinstance(scaling, dict):
        raise keys.fail(f"'rope_scaling' must be a set of parameters, not {scaling!r:.60}")
    parameters = {
        "full_attention": {
            "rope_theta": keys.number("rope_theta"),
            **given.get("full_attention", {}),
            **scaling,
        },
        "sliding_attention": {
            "rope_theta": keys.number("rope_local_base_freq"),
            **given.get("sliding_attention", {}),
        },
    }
    whole, local = (
        read_rope(
            Keys(
                keys.source,
                {**keys.values, "rope_scaling": None, "rope_parameters": parameters[kind]},
                keys.defaults,
            ),
            head_dim,
            partial=False,
            aliases={},
        )
        for kind in ("full_attention", "sliding_attention")
    )
    return whole[0], local[0], whole[1]


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
