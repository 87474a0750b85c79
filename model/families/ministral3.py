"""Ministral 3: Mistral with YaRN, whose queries are scaled by their position."""

from dataclasses import replace

from model.families.config_keys.keys import Keys
from model.families.config_keys.rope_keys import read_rope
from model.families.family import Family, layers

_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _fields(keys: Keys) -> dict[str, object]:
    parameters = keys.get("rope_parameters") or keys.get("rope_scaling")
    if not isinstance(parameters, dict):
        raise keys.fail(f"'rope_parameters' must be a set of parameters, not {parameters!r:.60}")
    given = Keys(keys.source, parameters)
    own = {"llama_4_scaling_beta", "max_position_embeddings"}
    values = {k: v for k, v in parameters.items() if k not in own}
    values = {**keys.values, "rope_parameters": values, "rope_scaling": None}
    rope, rotary_dim = read_rope(
        Keys(keys.source, values, keys.defaults), keys.integer("head_dim"), False, {}
    )
    beta = given.optional_number("llama_4_scaling_beta") or 0.0
    original = given.integer("original_max_position_embeddings", rope.original_max_positions or 1)
    return {
        "layers": layers(keys, keys.optional_integer("sliding_window")),
        "rope": replace(rope, query_beta=beta, original_max_positions=original),
        "rotary_dim": rotary_dim,
    }


FAMILY = Family(
    {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "rope_theta": 1e6,
        "rope_parameters": _ROPE,
        "sliding_window": None,
        "layer_types": None,
    },
    _fields,
)
