"""EXAONE 4: norms after attention and MLP, norms of heads, and layers that do not rotate."""

from dataclasses import replace

from model.families.config_keys.keys import Keys
from model.families.config_keys.rope_keys import NO_ROPE
from model.families.family import Family, layers
from model.families.olmo2 import POST_NORMS


def _fields(keys: Keys) -> dict[str, object]:
    window, pattern = keys.optional_integer("sliding_window"), keys.get("sliding_window_pattern")
    if window is None:  # every layer attends to all positions and rotates
        found = layers(keys, None, lambda layer: False)
    else:
        found = layers(keys, window, lambda layer: _is_local(keys, pattern, layer))
        found = tuple(replace(x, rope=NO_ROPE) if x.window is None else x for x in found)
    return {"layers": found, "pre_norms": False, "post_norms": True, "qk_norm": True}


def _is_local(keys: Keys, pattern: object, layer: int) -> bool:
    """Whether a layer has a window, by a period or by a sequence of L (local) and G (global)."""
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        last = keys.integer("num_hidden_layers") - 1
        return pattern[layer % len(pattern)] == "L" and layer != last
    return (layer + 1) % keys.integer("sliding_window_pattern") != 0


FAMILY = Family(
    {
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
    },
    _fields,
    POST_NORMS,
)
