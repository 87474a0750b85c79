"""Gemma 4: Gemma 3 with larger heads in layers without a window, and in some of its models keys as
values, shared keys and values, per-layer embeddings, or experts beside the dense MLP.
"""

from dataclasses import replace
from typing import Any

from model.config import HeadSizes, LayerConfig, MoeConfig
from model.families.config_keys.keys import Keys
from model.families.config_keys.moe_keys import top_k
from model.families.config_keys.rope_keys import ropes_by_layer_type
from model.families.family import Family, attention_biases, layers
from model.families.gemma2 import ACTIVATIONS, NAMES
from model.families.tensor_names import ExpertNames
from model.ops.specs import RouterSpec

_ROPES = {
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e6,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def _fields(keys: Keys) -> dict[str, Any]:
    if keys.get("use_bidirectional_attention") not in (None, "vision"):  # vision: in images alone
        raise keys.fail("'use_bidirectional_attention' is not supported")
    rope, local, _ = ropes_by_layer_type(keys, keys.number("rope_theta"))
    size = keys.integer("hidden_size_per_layer_input", 0, minimum=0)
    if size and keys.integer("vocab_size_per_layer_input") != keys.integer("vocab_size"):
        raise keys.fail("'vocab_size_per_layer_input' must be the same as 'vocab_size'")
    has_experts = keys.boolean("enable_moe_block")
    return attention_biases(keys) | {
        "layers": _layers(keys, local, has_experts),
        "rope": rope,
        "rotary_dim": keys.integer("head_dim"),
        "qk_norm": True,
        "value_norm": True,
        "post_norms": True,
        "embedding_scale": keys.integer("hidden_size") ** 0.5,
        "attention_scale": 1.0,
        "logits_softcap": keys.optional_number("final_logit_softcapping"),
        "per_layer_size": size,
        "layer_scalars": True,
        **({"moe": _experts(keys)} if has_experts else {}),
    }


def _experts(keys: Keys) -> MoeConfig:
    count = keys.integer("num_experts")
    return MoeConfig(
        num_experts=count,
        intermediate_size=keys.integer("moe_intermediate_size"),
        router=RouterSpec(top_k(keys, count), False, normalize=True, scales_experts=True),
        biases=False,
        beside_mlp=True,
    )


def _layers(keys: Keys, local: Any, sparse: bool) -> tuple[LayerConfig, ...]:
    count = keys.integer("num_hidden_layers")
    types = keys.get("layer_types")

    def is_local(layer: int) -> bool:  # also without a window the heads differ
        given = types[layer] == "sliding_attention" if types else (layer + 1) % 6 != 0
        return given and layer < count - 1

    found = layers(keys, keys.optional_integer("sliding_window"), is_local, sparse=sparse)
    first_shared = count - keys.integer("num_kv_shared_layers", 0, minimum=0)
    sources = {is_local(i): i for i in range(first_shared)}  # the last of each kind
    wide = 2 if keys.boolean("use_double_wide_mlp") else 1
    result = []
    for i, layer in enumerate(found):
        if is_local(i):
            layer = replace(layer, rope=local)
        else:
            layer = replace(layer, window=None, heads=_global_heads(keys, i))
        if i >= first_shared:
            if is_local(i) not in sources:
                raise keys.fail("'num_kv_shared_layers' leaves no layer whose keys are shared")
            size = wide * keys.integer("intermediate_size")
            layer = replace(layer, kv_source=sources[is_local(i)], intermediate_size=size)
        result.append(layer)
    return tuple(result)


def _global_heads(keys: Keys, layer: int) -> HeadSizes:
    """The heads of a layer without a window; newer configs list them by layer."""
    is_shared = keys.boolean("attention_k_eq_v")
    kv_heads = keys.integer("num_key_value_heads")
    by_layer = keys.get("per_layer_config")
    if by_layer is not None:
        own = by_layer.get(str(layer)) if isinstance(by_layer, dict) else None
        if not isinstance(own, dict) or set(own) - {"head_dim", "num_key_value_heads"}:
            raise keys.fail(f"'per_layer_config' must have the heads of layer {layer}")
        given = keys.inside(f"per_layer_config: {layer}", own)
        kv_heads = given.integer("num_key_value_heads", kv_heads)
        head_dim = given.integer("head_dim")
    else:
        if is_shared:
            kv_heads = keys.integer("num_global_key_value_heads", kv_heads)
        head_dim = keys.integer("global_head_dim")
    heads = keys.integer("num_attention_heads")
    if heads % kv_heads or head_dim % 2:
        raise keys.fail(f"{heads} heads of {head_dim} with {kv_heads} KV heads are not supported")
    return HeadSizes(kv_heads, head_dim, head_dim, values_are_keys=is_shared)


FAMILY = Family(
    {
        "vocab_size": 262_144,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "per_layer_config": None,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 1,
        "rope_parameters": _ROPES,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "sliding_window": 512,
        "layer_types": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": None,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "num_experts": None,
        "num_experts_per_tok": None,
        "moe_intermediate_size": None,
    },
    _fields,
    replace(
        NAMES,
        experts=ExpertNames(
            router="router.proj",
            correction="router.per_expert_scale",
            linears=(("experts.gate_up_proj", ("gate", "up")), ("experts.down_proj", ("down",))),
        ),
    ),
    aliases={"hidden_activation": "hidden_act", "top_k_experts": "num_experts_per_tok"},
    activations=ACTIVATIONS,
)
