"""Qwen3-Next: three of four layers are recurrent, experts with a shared one, gated attention."""

from dataclasses import replace
from typing import Any

from model.config import LayerConfig
from model.families.config_keys.keys import Keys
from model.families.config_keys.moe_keys import by_sparse_step, softmax_moe
from model.families.family import Family, attention_biases
from model.families.qwen2_moe import GATED_SHARED_EXPERT
from model.families.tensor_names import DeltaRuleNames, LinearName, TensorNames
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
GATED_ATTENTION: tuple[LinearName, ...] = (
    ("self_attn.q_proj", ("q", "gate")),
    ("self_attn.k_proj", ("k",)),
    ("self_attn.v_proj", ("v",)),
    ("self_attn.o_proj", ("o",)),
)
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


def hybrid_experts(keys: Keys, normalize: bool) -> dict[str, Any]:
    """`hybrid_fields` with experts, and one that all tokens share, in every layer."""
    experts, size = keys.integer("num_experts"), keys.integer("moe_intermediate_size")
    moe = softmax_moe(keys, experts, size, normalize)
    shared = keys.integer("shared_expert_intermediate_size")
    found = hybrid_fields(keys)
    layers = tuple(replace(layer, sparse=True) for layer in found["layers"])
    return found | {"layers": layers, "moe": replace(moe, shared_size=shared, shared_gate=True)}


def _fields(keys: Keys) -> dict[str, Any]:
    found = hybrid_experts(keys, keys.boolean("norm_topk_prob"))
    return found | {"layers": by_sparse_step(keys, found["layers"])}


FAMILY = Family(
    {
        **HYBRID,
        "vocab_size": 151_936,
        "num_hidden_layers": 48,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
    },
    _fields,
    TensorNames(
        attention=GATED_ATTENTION,
        delta_rule=DeltaRuleNames(
            linears=(
                ("linear_attn.in_proj_qkvz", ("q", "k", "v", "z")),
                ("linear_attn.in_proj_ba", ("b", "a")),
                ("linear_attn.out_proj", ("out",)),
            ),
            interleaved=True,
        ),
        experts=GATED_SHARED_EXPERT,
    ),
    neutral=NEUTRAL,
    norm_offset=1.0,
    partial_rotary=True,
    others=MTP,
)
