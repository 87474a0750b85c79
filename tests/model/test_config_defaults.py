"""A key that config.json lacks has the value that transformers' config class gives it."""

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

from model.config import CheckpointError, ModelConfig, RopeConfig
from model.families import FAMILIES, family, parse_config
from model.families.config_keys.keys import _HARMLESS
from model.families.family import _DEFAULTS
from model.rope import rope_table

CLASSES: dict[str, Any] = {
    "deepseek_v2": tf.DeepseekV2Config,
    "deepseek_v3": tf.DeepseekV3Config,
    "exaone4": tf.Exaone4Config,
    "gemma2": tf.Gemma2Config,
    "gemma3_text": tf.Gemma3TextConfig,
    "glm4_moe": tf.Glm4MoeConfig,
    "glm4_moe_lite": tf.Glm4MoeLiteConfig,
    "gpt_oss": tf.GptOssConfig,
    "granite": tf.GraniteConfig,
    "hunyuan_v1_dense": tf.HunYuanDenseV1Config,
    "kimi_k2": tf.DeepseekV3Config,  # to which it is equal but for its name
    "llama": tf.LlamaConfig,
    "minimax_m2": tf.MiniMaxM2Config,
    "ministral3": tf.Ministral3Config,
    "mistral": tf.MistralConfig,
    "mixtral": tf.MixtralConfig,
    "olmo2": tf.Olmo2Config,
    "olmo3": tf.Olmo3Config,
    "olmoe": tf.OlmoeConfig,
    "phi3": tf.Phi3Config,
    "qwen2": tf.Qwen2Config,
    "qwen2_moe": tf.Qwen2MoeConfig,
    "qwen3": tf.Qwen3Config,
    "qwen3_moe": tf.Qwen3MoeConfig,
    "seed_oss": tf.SeedOssConfig,
    "smollm3": tf.SmolLM3Config,
}
SIZES: dict[str, Any] = {  # which no config lacks
    "vocab_size": 100,
    "hidden_size": 1024,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}
# A value of each key that is no family's default.
OTHER: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 3000,
    "original_max_position_embeddings": 2048,
    "rms_norm_eps": 3e-5,
    "rope_theta": 5e5,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "sliding_window": 17,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "num_local_experts": 16,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
    "qkv_bias": False,
    "clip_qkv": None,
    "n_routed_experts": 32,
    "n_shared_experts": 2,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "num_mtp_layers": 2,
    "kv_lora_rank": 96,
    "q_lora_rank": 80,
    "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 24,
    "v_head_dim": 56,
    "rope_interleave": False,
    "topk_method": "group_limited_greedy",
    "mlp_layer_types": ["sparse", "dense", "sparse"],
    "swiglu_alpha": 1.5,
    "swiglu_limit": 5.0,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.3,
    "logits_scaling": 4.0,
    "eos_token_id": 7,
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 64,
    "attn_logit_softcapping": 20.0,
    "final_logit_softcapping": 10.0,
    "use_bidirectional_attention": False,
    "attention_out_bias": True,
    "no_rope_layers": [1, 0, 1],
    "no_rope_layer_interval": 2,
    "sliding_window_pattern": 2,
}


def own_keys(model_type: str) -> list[str]:
    """The keys of the config class that change what is computed, without the sizes."""
    own = {field.name for field in fields(CLASSES[model_type])}
    own -= {field.name for field in fields(tf.PreTrainedConfig)}
    return sorted(own - SIZES.keys() - _HARMLESS | {"eos_token_id"})


def full_config(model_type: str) -> dict[str, Any]:
    values = SIZES | {key: OTHER[key] for key in own_keys(model_type)}
    if model_type == "gpt_oss":
        values["attention_bias"] = False
    if model_type in ("gemma3_text", "olmo3"):
        values["rope_parameters"] = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
    if model_type == "deepseek_v2":  # which has neither
        values |= {"mlp_bias": False, "norm_topk_prob": False}
    if model_type == "phi3":  # which has no linear scaling
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    return values


CASES = [
    (model_type, key)
    for model_type in FAMILIES
    for key in ["nothing", *own_keys(model_type)]
    # Which no config lacks.
    if model_type != "deepseek_v2" or key not in ("num_experts_per_tok", "topk_group")
]
# Keys for which null is a value; of others it is an error in transformers.
NULLABLE = [
    (model_type, key)
    for model_type, key in CASES
    if key in ("num_key_value_heads", "head_dim", "sliding_window", "layer_types")
    if "None" in str(CLASSES[model_type].__dataclass_fields__[key].type)
    if model_type not in ("gpt_oss", "exaone4") or key != "sliding_window"  # their layers need one
]


def check(model_type: str, values: dict[str, Any]) -> ModelConfig:
    """Compare a config with what the config class makes of the same keys, and return it."""
    # The class changes what it gets.
    expected = CLASSES[model_type](**copy.deepcopy(values))
    config = parse_config({**values, "model_type": model_type}, "config.json")
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if model_type in LATENT:
        check_latent(config, expected)
    else:
        head_dim = getattr(expected, "head_dim", None) or hidden // heads
        assert config.head_dim == head_dim
        assert config.num_kv_heads == (expected.num_key_value_heads or heads)
    assert config.max_positions == expected.max_position_embeddings
    assert config.norm.eps == expected.rms_norm_eps
    assert config.tie_word_embeddings == expected.tie_word_embeddings
    stated_bias = getattr(expected, "attention_bias", False)
    stated_out_bias = getattr(expected, "attention_out_bias", stated_bias)
    assert config.o_bias == (stated_out_bias and model_type != "glm4_moe")
    own_bias = getattr(expected, "qkv_bias", model_type == "qwen2")
    if model_type not in LATENT:
        assert config.qkv_bias == getattr(expected, "attention_bias", own_bias)
    assert config.mlp_bias == getattr(expected, "mlp_bias", False)
    stop_ids = expected.eos_token_id if expected.eos_token_id is not None else []
    assert config.stop_ids == set(stop_ids if isinstance(stop_ids, list) else [stop_ids])
    is_gemma = model_type.startswith("gemma")
    scale = hidden**0.5 if is_gemma else getattr(expected, "embedding_multiplier", 1.0)
    assert config.embedding_scale == scale
    assert config.residual_scale == getattr(expected, "residual_multiplier", 1.0)
    attention = expected.query_pre_attn_scalar**-0.5 if is_gemma else None
    if model_type not in LATENT:
        assert config.attention_scale == getattr(expected, "attention_multiplier", attention)
    assert config.attention_softcap == getattr(expected, "attn_logit_softcapping", None)
    assert config.logits_softcap == getattr(expected, "final_logit_softcapping", None)
    assert (config.activation.kind == "gelu_tanh") == is_gemma
    has_no_pre_norms = model_type in ("olmo2", "olmo3", "exaone4")
    assert config.pre_norms != has_no_pre_norms
    assert config.post_norms == (is_gemma or has_no_pre_norms)
    assert config.logits_scale == 1 / getattr(expected, "logits_scaling", 1.0)
    check_layers(config, expected)
    check_experts(config, expected)
    check_rope(config, expected)
    return config


LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2")


def check_latent(config: ModelConfig, expected: Any) -> None:
    latent, rotary = config.latent, expected.qk_rope_head_dim
    assert latent is not None
    assert (config.num_kv_heads, config.head_dim) == (1, expected.kv_lora_rank + rotary)
    assert config.rotary_dim == rotary
    assert latent.rank == expected.kv_lora_rank
    assert latent.query_rank == expected.q_lora_rank
    assert latent.plain_dim == expected.qk_nope_head_dim
    assert latent.value_dim == expected.v_head_dim
    assert latent.bias == expected.attention_bias
    assert latent.has_interleaved_pairs == getattr(expected, "rope_interleave", True)
    scale = (latent.plain_dim + rotary) ** -0.5
    scale = yarn_apply_mscale(expected.rope_parameters, scale)
    assert config.attention_scale == pytest.approx(scale)


def check_layers(config: ModelConfig, expected: Any) -> None:
    window = getattr(expected, "sliding_window", None)
    if window is not None and window >= config.max_positions:
        window = None
    types = getattr(expected, "layer_types", None)
    types = types or ["sliding_attention"] * expected.num_hidden_layers
    windows = [window if kind == "sliding_attention" else None for kind in types]
    assert [layer.window for layer in config.layers] == windows


def check_experts(config: ModelConfig, expected: Any) -> None:
    if not hasattr(expected, "num_experts_per_tok"):
        assert config.moe is None
        return
    assert config.moe is not None
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next(getattr(expected, name) for name in names if hasattr(expected, name))
    assert config.moe.num_experts == count
    assert config.moe.router.top_k == expected.num_experts_per_tok
    size = getattr(expected, "moe_intermediate_size", expected.intermediate_size)
    assert config.moe.intermediate_size == size
    shared = getattr(expected, "n_shared_experts", 0) * size
    shared = getattr(expected, "shared_expert_intermediate_size", shared)
    assert config.moe.shared_size == shared
    assert config.moe.shared_gate == (shared > 0 and not hasattr(expected, "n_shared_experts"))
    assert config.moe.router.scale == getattr(expected, "routed_scaling_factor", 1.0)
    groups, stated = config.moe.router.groups, getattr(expected, "n_group", 1)
    if getattr(expected, "topk_method", "group_limited_greedy") == "greedy":
        stated = 1
    if (stated or 1) > 1:
        assert groups is not None
        assert (groups.count, groups.chosen) == (stated, expected.topk_group)
    else:
        assert groups is None
    stated = getattr(expected, "num_nextn_predict_layers", 0)
    assert config.mtp_layers == getattr(expected, "num_mtp_layers", stated)
    if hasattr(expected, "norm_topk_prob"):
        assert config.moe.router.normalize == expected.norm_topk_prob
    step, dense = (
        getattr(expected, "decoder_sparse_step", 1),
        getattr(expected, "mlp_only_layers", []),
    )
    first = getattr(expected, "first_k_dense_replace", 0)
    for i, layer in enumerate(config.layers):
        if hasattr(expected, "mlp_layer_types"):
            assert layer.sparse == (expected.mlp_layer_types[i] == "sparse")
            continue
        assert layer.sparse == (i >= first and i not in dense and (i + 1) % step == 0)
    if hasattr(expected, "swiglu_limit"):
        assert config.activation.limit == expected.swiglu_limit
        assert config.activation.alpha == expected.swiglu_alpha


def check_rope(config: ModelConfig, expected: Any) -> None:
    parameters = expected.rope_parameters
    rotates = getattr(expected, "no_rope_layers", None) or [1] * len(config.layers)
    if config.model_type == "exaone4" and expected.sliding_window is not None:
        rotates = [kind == "sliding_attention" for kind in expected.layer_types]
    for layer, is_rotated in zip(config.layers, rotates, strict=True):
        assert (layer.rope is not None and layer.rope.kind == "none") != is_rotated
    if "rope_type" in parameters:
        return check_one_rope(config, config.rope, parameters, expected)
    for layer, kind in zip(config.layers, expected.layer_types, strict=True):
        rope = layer.rope or config.rope
        check_one_rope(config, rope, parameters[kind], expected, layer_type=kind)
    return None


def check_one_rope(
    config: ModelConfig, found: RopeConfig, rope: dict[str, Any], expected: Any, **layer: str
) -> None:
    factor = 1.0
    dim = config.rotary_dim
    if rope.get("alpha"):  # which only stretches the base (Hunyuan)
        theta = rope["rope_theta"] * rope["alpha"] ** (dim / (dim - 2))
        rope = {"rope_type": "default", "rope_theta": theta}
    if rope["rope_type"] == "default":
        frequencies = rope["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](expected, **layer)
    angles = torch.outer(torch.arange(40.0), frequencies.float())
    table = torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
    torch.testing.assert_close(rope_table(found, config.rotary_dim, 40), table)


def test_every_key_of_a_config_class_is_understood() -> None:
    for model_type in FAMILIES:
        own = family(model_type)
        understood = own.defaults.keys() | own.aliases.keys() | _DEFAULTS.keys()
        assert set(own_keys(model_type)) - {"eos_token_id"} <= understood, model_type


@pytest.mark.parametrize(("model_type", "missing"), CASES)
def test_a_missing_key_has_the_value_of_transformers(model_type: str, missing: str) -> None:
    values = full_config(model_type)
    values.pop(missing, None)
    if missing == "use_sliding_window":
        values.pop("layer_types", None)  # a sliding layer needs a window
    check(model_type, values)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_of_sizes_alone_is_that_of_transformers(model_type: str) -> None:
    needed = {"num_experts_per_tok": 6} if model_type == "deepseek_v2" else {}
    check(model_type, SIZES | needed)


@pytest.mark.parametrize(("model_type", "key"), NULLABLE)
def test_null_is_not_the_default_of_a_missing_key(model_type: str, key: str) -> None:
    values = full_config(model_type) | {key: None}
    if key == "sliding_window":
        values.pop("layer_types", None)
    check(model_type, values)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_gpt_oss_is_scaled_unless_its_config_has_rope_parameters(key: str) -> None:
    for value in (None, {}, {"rope_type": "default", "rope_theta": 1e4}):
        if value != {} or key == "rope_scaling":
            check("gpt_oss", SIZES | {key: value})
    config = parse_config(SIZES | {"model_type": "gpt_oss", "rope_theta": 1e6}, "config.json")
    assert (config.rope.kind, config.rope.factor, config.rope.theta) == ("yarn", 32, 1e6)
    assert not config.rope.truncate


def test_rope_scaling_replaces_rope_parameters() -> None:
    check(
        "llama",
        SIZES
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 2e4},
    )


def test_the_original_context_of_phi3_is_outside_the_rope_parameters() -> None:
    factors = [1 + i / 10 for i in range(16)]
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    values = SIZES | {"max_position_embeddings": 65_536, "rope_parameters": rope}
    check("phi3", values)
    check("phi3", values | {"rope_parameters": rope | {"original_max_position_embeddings": 99}})
    config = parse_config(values | {"model_type": "phi3"}, "config.json")
    assert (config.rope.original_max_positions, config.rope.factor) == (4096, 16)


def test_generation_config_replaces_the_default_of_the_stop_id() -> None:
    values = SIZES | {"model_type": "llama"}
    assert parse_config(values, "config.json", frozenset({9})).stop_ids == {9}
    assert parse_config(values, "config.json", frozenset()).stop_ids == frozenset()
    assert parse_config(values | {"eos_token_id": 5}, "c", frozenset({9})).stop_ids == {5, 9}


@pytest.mark.parametrize("size", SIZES)
def test_a_missing_size_is_an_error(size: str) -> None:
    values = {key: value for key, value in SIZES.items() if key != size}
    with pytest.raises(CheckpointError, match=f"'{size}' is missing"):
        parse_config(values | {"model_type": "llama"}, "config.json")
