"""The keys of multi-head latent attention → LatentConfig and what follows from it."""

from typing import Any

from model.config import LatentConfig
from model.families.config_keys.keys import Keys
from model.families.config_keys.rope_keys import read_rope, score_factor
from model.families.tensor_names import LinearName
from model.ops.specs import NormSpec

_LATENT_NORM = NormSpec(1e-6)  # whatever `rms_norm_eps` is

LATENT_NAMES: tuple[LinearName, ...] = (
    ("self_attn.q_proj", ("direct_q",)),
    ("self_attn.q_a_proj", ("q_down",)),
    ("self_attn.q_b_proj", ("q",)),
    ("self_attn.kv_a_proj_with_mqa", ("kv_down",)),
    ("self_attn.kv_b_proj", ("kv",)),
    ("self_attn.o_proj", ("o",)),
)
"""The linears of such attention; a model has either the first or the next two."""


LATENT_DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_head_dim": None,  # the sum of the next two
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""The keys of such attention and DeepSeek's values of them."""


def latent_fields(keys: Keys, *, interleaved: bool) -> dict[str, Any]:
    """The fields of ModelConfig that latent attention sets."""
    plain, rotary = keys.integer("qk_nope_head_dim"), keys.integer("qk_rope_head_dim")
    rank, bias = keys.integer("kv_lora_rank"), keys.boolean("attention_bias")
    whole = keys.integer("qk_head_dim", plain + rotary)
    if whole != plain + rotary:
        raise keys.fail(f"'qk_head_dim' must be {plain + rotary}, not {whole}")
    rope, rotary = read_rope(keys, rotary, partial=False, aliases={})
    latent = LatentConfig(
        rank=rank,
        query_rank=keys.optional_integer("q_lora_rank"),
        plain_dim=plain,
        value_dim=keys.integer("v_head_dim"),
        norm=_LATENT_NORM,
        has_interleaved_pairs=interleaved,
        bias=bias,
    )
    return {
        "latent": latent,
        "num_kv_heads": 1,
        "head_dim": rank + rotary,
        "rotary_dim": rotary,
        "rope": rope,
        "attention_scale": (plain + rotary) ** -0.5 * score_factor(keys),
        "o_bias": bias,
    }
