"""Published configs load, with the values that transformers reads from them.

published_configs.json maps the name of a repository on the Hub to the content of its config.json;
a number stands for a list of that many factors of longrope.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model import CheckpointError, Transformer
from model.families import FAMILIES, parse_config
from model.rope import cos_sin_factor
from tests.model.test_config_defaults import check

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "published_configs.json").read_text()
)
CODER = "Qwen/Qwen3-Coder-30B-A3B-Instruct"


def published(name: str) -> dict[str, Any]:
    values = json.loads(json.dumps(CONFIGS[name]))
    for key, value in (values.get("rope_scaling") or {}).items():
        if key in ("short_factor", "long_factor"):
            values["rope_scaling"][key] = [1 + i / 8 for i in range(value)]
    return values


def first(model_type: str) -> dict[str, Any]:
    """The first config of a family."""
    return published(next(n for n, c in CONFIGS.items() if c["model_type"] == model_type))


def test_there_are_sixty_of_all_families() -> None:
    assert len(CONFIGS) >= 60
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_read_as_in_transformers(name: str) -> None:
    values = published(name)
    config = parse_config(values, name)
    assert len(list(Transformer(config).parameters())) > 90
    scaling = values.get("rope_scaling") or {}
    if "attn_factor" in scaling:  # transformers ignores it; see the next test
        scaling["attention_factor"] = 1.0
    if scaling.get("type") == "su":  # transformers no longer loads it without another key
        scaling["type"] = "longrope"
    checked = check(values.pop("model_type"), values)
    assert checked == replace(config, rope=checked.rope)


def test_attn_factor_multiplies_the_factor_of_yarn() -> None:
    rope = parse_config(published("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B"), "deepseek").rope
    assert rope.factor == 4
    assert cos_sin_factor(rope) == pytest.approx(1.0)  # 0.878 · (0.1 · ln 4 + 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swish"},
        {"torch_dtype": "auto"},
        {"dtype": "half"},
        {"dtype": "float"},
        {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_length": 4096},
        {"use_qk_norm": True},
        {"shared_expert_intermediate_size": 0.0},
        {"attention_dropout": 0.1},
        {"is_causal": True},
        {"quantization_config": {}},
        {"num_local_experts": 128},
        {"num_experts": None, "num_local_experts": 128},
        {"layer_types": ["full_attention"] * 48},
        {"use_qk_norm": None},
    ],
)
def test_keys_that_change_nothing_are_accepted(changes: dict[str, Any]) -> None:
    values = published(CODER)
    config = parse_config(values, CODER)
    values = {k: v for k, v in (values | changes).items() if v is not None}
    dtype = {"half": "float16", "float": "float32"}.get(str(changes.get("dtype")), "bfloat16")
    changed = parse_config(values, CODER)
    assert changed.dtype == dtype
    assert changed.__dict__ | {"dtype": ""} == config.__dict__ | {"dtype": ""}


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("qwen3_moe", {"use_qk_norm": False}, "'use_qk_norm' must be true, not false"),
        ("qwen3", {"use_qk_norm": False}, "'use_qk_norm' must be true, not false"),
        ("llama", {"use_qk_norm": True}, "'use_qk_norm' = True is not supported"),
        ("qwen3_moe", {"qkv_bias": True}, "'qkv_bias' = True is not supported"),
        ("qwen2", {"qkv_bias": False}, "'qkv_bias' must be true, not false"),
        ("qwen2", {"attention_bias": True}, "'attention_bias' = True is not supported"),
        ("mistral", {"attention_bias": True}, "'attention_bias' = True is not supported"),
        (
            "qwen3_moe",
            {"shared_expert_intermediate_size": 512},
            "'shared_expert_intermediate_size' must be 0, not 512",
        ),
        ("qwen3_moe", {"mlp_only_layers": 3}, "'mlp_only_layers' must be a list of layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "'decoder_sparse_step' must be an integer"),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 9, "layer_types": "full"},
            "'layer_types' must be the same for all layers",
        ),
        ("qwen3_moe", {"num_local_experts": 64}, "'num_local_experts' is 64 but 'num_experts'"),
        ("gpt_oss", {"experts_per_token": 2}, "'experts_per_token' is 2 but 'num_experts_per_tok'"),
        ("mixtral", {"norm_topk_prob": False}, "'norm_topk_prob' must be true, not false"),
        ("llama", {"rope_interleaved": True}, "'rope_interleaved' = True is not supported"),
        ("llama", {"activation": "gelu"}, '\'activation\' must be "swiglu", not "gelu"'),
        ("llama", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("qwen2", {"is_causal": False}, "'is_causal' must be true, not false"),
        ("qwen2", {"use_mrope": True}, "'use_mrope' = True is not supported"),
        ("mistral", {"pruned_heads": {"1": [0]}}, "'pruned_heads'"),
        ("mistral", {"is_encoder_decoder": True}, "'is_encoder_decoder' = True is not supported"),
        ("phi3", {"lm_head_bias": True}, "'lm_head_bias' = True is not supported"),
        ("phi3", {"full_attn_mod": True}, "'full_attn_mod' must be 1, not true"),
        (
            "qwen2",
            {"dual_chunk_attention_config": {"chunk_size": 9}},
            "'dual_chunk_attention_config'",
        ),
        ("llama", {"dtype": "float64"}, "dtype 'float64' is not supported"),
    ],
)
def test_keys_that_change_the_results_are_refused(
    model_type: str, changes: dict[str, Any], words: str
) -> None:
    values = first(model_type)
    if changes.get("layer_types") == "full":
        changes = changes | {"layer_types": ["full_attention"] * values["num_hidden_layers"]}
    with pytest.raises(CheckpointError, match=words):
        parse_config(values | changes, "config.json")
