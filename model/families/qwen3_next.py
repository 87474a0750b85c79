"""Qwen3-Next: three of four layers are recurrent, experts with a shared one, gated attention."""

from dataclasses import replace
from typing import Any

from model.config import LayerConfig
from model.families.config_keys.keys import Keys
from model.families.family import attention_biases
from model.ops.specs import DeltaRuleSpec

HYBRID: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": None,
    "mtp_num_hidden_layers": None,  # of layers that are not run, as mtp_use_dedicated_embeddings
    "mtp_use_dedicated_embeddings": None,
    "full_attention_interval": 4,
}
"""Defaults that Qwen3-Next and Qwen3.5 share. Published configs leave out some sizes."""

MTP = ("mtp.",)
"""Beginnings of the names of tensors for predicting several tokens."""
NEUTRAL = {"attn_output_gate": True, "mamba_ssm_dtype": "float32"}


def hybrid_fields(keys: Keys) -> dict[str, Any]:
    """The fields that Qwen3-Next and Qwen3.5 share, with dense MLPs."""
    spec = DeltaRuleSpec(
        key_heads=keys.integer("linear_num_key_heads"),
        value_heads=keys.integer("linear_num_value_heads"),
        key_dim=keys.integer("linear_key_head_dim"),
        value_dim=keys.integer("linear_value_head_dim"),
        kernel=keys.integer("linear_conv_kernel_dim", minimum=2),
    )
    if spec.value_heads % spec.key_heads:
        raise keys.fail(
            f"linear_num_value_heads {spec.value_heads} is not a multiple of linear_num_key_heads "
            f"{spec.key_heads}"
        )
    return attention_biases(keys) | {
        "layers": _layers(keys),
        "qk_norm": True,
        "output_gate": True,
        "delta_rule": spec,
    }


def _layers(keys: Keys) -> tuple[LayerConfig, ...]:
    count, types = keys.integer("num_hidden_layers"), keys.get("layer_types")
    if types is None:
        interval = keys.integer("full_attention_interval")
        types = ["full" if (i + 1) % interval == 0 else "linear" for i in range(count)]
        types = [f"{kind}_attention" for kind in types]
    if not isinstance(types, list) or len(types) != count:
        raise keys.fail(f"'layer_types' must list one type for each of the {count} layers")
    for kind in types:
        if kind not in ("linear_attention", "full_attention"):
            raise keys.fail(
                f"layer type {str(kind)[:60]!r} is not supported; supported: full_attention, "
                "linear_attention"
            )
    if "full_attention" not in types:
        raise keys.fail("'layer_types' must have a layer of type full_attention")
    layer = LayerConfig(window=None, sparse=False)
    return tuple(replace(layer, recurrent=kind == "linear_attention") for kind in types)
