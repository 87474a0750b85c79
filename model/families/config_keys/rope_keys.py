"""The keys of rotary embeddings → RopeConfig."""

import math
from collections.abc import Mapping
from typing import Any

from model.config import RopeConfig
from model.families.config_keys.keys import Keys

NO_ROPE = RopeConfig(1.0, "none")
"""Of layers that do not rotate queries and keys (NoPE)."""

_KEYS = {
    "default": "",
    "linear": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
    "yarn": (
        "factor original_max_position_embeddings beta_fast beta_slow truncate attention_factor"
        " attn_factor mscale mscale_all_dim"
    ),
    "longrope": (
        "factor original_max_position_embeddings short_factor long_factor attention_factor"
    ),
}


def read_rope(
    keys: Keys, head_dim: int, partial: bool, aliases: Mapping[str, str]
) -> tuple[RopeConfig, int]:
    """The rotary embedding and how many values of each head it rotates.

    Read from `rope_parameters` (newer), or `rope_scaling` and `rope_theta` (older). partial: the
    family supports `partial_rotary_factor`. aliases: the family's other names of rope types.
    """
    rope = _parameters(keys)
    theta = rope.number("rope_theta", keys.number("rope_theta", keys.defaults["rope_theta"]))
    if theta <= 1:
        raise keys.fail(f"'rope_theta' must be above 1, not {theta}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if isinstance(kind, str):
        kind = aliases.get(kind, kind)
    if not isinstance(kind, str) or kind not in _KEYS:
        raise keys.fail(f"rope type {kind!r} is not supported; supported: {', '.join(_KEYS)}")
    rope.refuse_unknown(
        (*_KEYS[kind].split(), "rope_theta", "rope_type", "type", "partial_rotary_factor")
    )
    share = rope.number("partial_rotary_factor", keys.get("partial_rotary_factor", 1.0))
    if share > 1 or (share < 1 and not partial):
        raise keys.fail(f"'partial_rotary_factor' of {share:g} is not supported")
    rotary_dim = int(head_dim * share)
    if rotary_dim % 2 or not rotary_dim:
        raise keys.fail(f"rotary embeddings need an even number of values, not {rotary_dim}")
    return _read_kind(keys, rope, kind, theta, rotary_dim), rotary_dim


def ropes_by_layer_type(keys: Keys, local_theta: float) -> tuple[RopeConfig, RopeConfig, int]:
    """The rotary embeddings of layers without and with a window, and the values they rotate.

    Read from `rope_parameters` by layer type. The older `rope_scaling` is that of layers without a
    window; local_theta: the base of layers with one.
    """
    heads = keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", max(1, keys.integer("hidden_size") // heads))
    given = keys.get("rope_parameters") or {}
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
            "rope_theta": local_theta,
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


def score_factor(keys: Keys) -> float:
    """What `mscale_all_dim` multiplies attention's scores by (DeepSeek's code of YaRN)."""
    rope = _parameters(keys)
    share = rope.optional_number("mscale_all_dim")
    if share is None or rope.get("rope_type", rope.get("type", "default")) == "default":
        return 1.0
    return (0.1 * share * math.log(max(rope.number("factor"), 1.0)) + 1) ** 2


def _yarn_attention_factor(rope: Keys) -> float | None:
    """The stated factor, or that of `mscale` and `mscale_all_dim` (DeepSeek's code of YaRN)."""
    stated = rope.optional_number("attention_factor")
    above, below = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    if stated is not None or above is None or below is None:
        return stated
    log = math.log(max(rope.number("factor"), 1.0))
    return (0.1 * above * log + 1) / (0.1 * below * log + 1)


def _parameters(keys: Keys) -> Keys:
    """The parameters of the rotary embedding, or the family's own where the config has none."""
    for key in ("rope_scaling", "rope_parameters"):
        found = keys.get(key, {})
        if not isinstance(found, dict) or any(isinstance(v, dict) for v in found.values()):
            raise keys.fail(f"'{key}' must be one set of parameters for all layers, not {found!r}")
    own = keys.defaults["rope_parameters"] or {}
    # The older key counts if both are there, as in transformers.
    values: dict[str, Any] = keys.get("rope_scaling") or keys.get("rope_parameters", own)
    return Keys(keys.source, {key: value for key, value in values.items() if value is not None})


def _read_kind(keys: Keys, rope: Keys, kind: str, theta: float, rotary_dim: int) -> RopeConfig:
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, rope.number("factor"))
    key, positions = "original_max_position_embeddings", keys.integer("max_position_embeddings")
    # Outside of the rope parameters, as Phi-3 writes it, it takes precedence.
    original = keys.integer(key, rope.integer(key, positions))
    if kind == "llama3":
        return RopeConfig(
            theta,
            kind,
            rope.number("factor"),
            original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    if kind == "longrope":
        return RopeConfig(
            theta,
            kind,
            rope.number("factor", positions / original),
            original,
            attention_factor=rope.optional_number("attention_factor"),
            short_factors=rope.numbers("short_factor", rotary_dim // 2),
            long_factors=rope.numbers("long_factor", rotary_dim // 2),
        )
    return RopeConfig(
        theta,
        kind,
        rope.number("factor"),
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
        attention_factor=_yarn_attention_factor(rope),
        attn_factor=rope.number("attn_factor", 1.0),
    )
