"""GGUF metadata → the keys of a config.json, as the model families read them.

What llama.cpp derives instead of storing it, it derives here, too. A key of the architecture that
is neither understood nor harmless is refused, as it is in a config.json.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from model.gguf.header import Gguf
from model.gguf.stop_tokens import stop_ids

# GGUF's keys after "ARCHITECTURE." → keys of a config.json.
_REQUIRED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_YARN = {
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_attn_factor": "attn_factor",
}
_ROPE = ("type", "factor", "original_context_length", "attn_factor", *_YARN)
# Keys that change nothing, or only at other values than these; None: at no value.
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "vocab_size": None,  # the embedding says it
    "rope.scaling.finetuned": None,
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scale_linear": (1.0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": None,
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_gating_func": (1,),  # softmax
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "moe_every_n_layers": (0, 1),
    "logit_scale": (0.0, 1.0),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "pooling_type": (0,),
}

Values = dict[str, Any]


@dataclass(frozen=True)
class _Architecture:
    """How the metadata of an architecture become the config of a family."""

    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)  # in addition to the shared ones
    fixed: Mapping[str, Any] = field(default_factory=dict)  # what the architecture implies
    finish: Callable[[Gguf, Values], None] = lambda gguf, config: None


def config_values(gguf: Gguf) -> Values:
    """The content of the config.json that this file replaces. Raises CheckpointError."""
    name = gguf.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise gguf.fail(
            f"architecture {name!r:.60} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    architecture, given = _ARCHITECTURES[name], _given(gguf, f"{name}.")
    config: Values = {"model_type": architecture.model_type, **architecture.fixed}
    for key, own in {**_REQUIRED, **_OPTIONAL, **architecture.keys}.items():
        if key in given:
            config[own] = given[key]
        elif key in _REQUIRED:
            raise gguf.fail(f"its metadata has no '{name}.{key}'")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        config.setdefault("head_dim", hidden // heads)
    if given.get("attention.value_length", config.get("head_dim")) != config.get("head_dim"):
        raise gguf.fail(f"'{name}.attention.value_length' must be '{name}.attention.key_length'")
    config |= {
        "vocab_size": _vocabulary(gguf),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "dtype": _dtype(gguf),
        "eos_token_id": stop_ids(gguf),
    }
    _add_rope(gguf, config, given, name)
    architecture.finish(gguf, config)
    _refuse_unknown(gguf, architecture, given, name)
    return config


def _given(gguf: Gguf, prefix: str) -> Values:
    """The values of the architecture; a list of equal values, one a layer, is one value."""
    given = {
        key[len(prefix) :]: value for key, value in gguf.metadata.items() if key.startswith(prefix)
    }
    for key, value in given.items():
        if not isinstance(value, str | int | float) and len(set(value)) == 1:
            given[key] = value[0]
    return given


def _refuse_unknown(gguf: Gguf, architecture: _Architecture, given: Values, name: str) -> None:
    understood = {
        *_REQUIRED, *_OPTIONAL, *architecture.keys, "attention.value_length",
        "rope.dimension_count", *(f"rope.scaling.{key}" for key in _ROPE),
    }  # fmt: skip
    for key, value in given.items():
        neutral = _NEUTRAL.get(key, ())
        if key not in understood and neutral is not None and value not in neutral:
            raise gguf.fail(
                f"'{name}.{key}' = {value!r:.60} is not supported and may change the results"
            )


def _vocabulary(gguf: Gguf) -> int:
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise gguf.fail("tensor 'token_embd.weight' is missing: this is not a language model")
    return embedding.shape[0]


def _dtype(gguf: Gguf) -> str:
    """The dtype of a file whose weights are not quantized; quantized ones get bfloat16."""
    kinds = {tensor.type.name for tensor in gguf.tensors.values() if len(tensor.shape) > 1}
    only = kinds.pop() if len(kinds) == 1 else ""
    return {"F32": "float32", "F16": "float16"}.get(only, "bfloat16")


def _add_rope(gguf: Gguf, config: Values, given: Values, name: str) -> None:
    """The keys of the rotary embedding."""
    rotated, head_dim = given.get("rope.dimension_count"), config.get("head_dim")
    if rotated is not None and rotated != head_dim:
        if not isinstance(rotated, int) or not isinstance(head_dim, int) or head_dim < 1:
            raise gguf.fail(
                f"'{name}.rope.dimension_count' must be an integer, not {rotated!r:.60}"
            )
        config["partial_rotary_factor"] = rotated / head_dim
    kind = given.get("rope.scaling.type", "none")
    original = given.get("rope.scaling.original_context_length")
    if "rope_freqs.weight" in gguf.tensors and kind == "none":
        # Llama 3's scaling, whose parameters are not stored but their effect on each frequency.
        factors = gguf.floats("rope_freqs.weight")
        config["rope_scaling"] = {
            "rope_type": "longrope", "short_factor": factors, "long_factor": factors,
            "attention_factor": 1.0,
        }  # fmt: skip
    elif "rope_factors_long.weight" in gguf.tensors:
        config["original_max_position_embeddings"] = original
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": gguf.floats("rope_factors_short.weight"),
            "long_factor": gguf.floats("rope_factors_long.weight"),
            "attention_factor": given.get("rope.scaling.attn_factor"),
        }
    elif kind == "linear":
        config["rope_scaling"] = {"rope_type": kind, "factor": given.get("rope.scaling.factor")}
    elif kind == "yarn":
        config["rope_scaling"] = {
            "rope_type": kind,
            "factor": given.get("rope.scaling.factor"),
            "original_max_position_embeddings": original,
            **{own: given.get(f"rope.scaling.{key}") for key, own in _YARN.items()},
        }
    elif kind not in ("none", "longrope"):
        raise gguf.fail(f"'{name}.rope.scaling.type' {kind!r:.60} is not supported")


def _finish_llama(gguf: Gguf, config: Values) -> None:
    """Mistral and Mixtral are stored as llama."""
    config["attention_bias"] = "blk.0.attn_output.bias" in gguf.tensors
    config["mlp_bias"] = "blk.0.ffn_down.bias" in gguf.tensors
    if config.get("num_local_experts"):
        config["model_type"] = "mixtral"
    elif config.get("sliding_window"):
        config["model_type"] = "mistral"
    for key in ("sliding_window", "num_local_experts", "num_experts_per_tok"):
        if not config.get(key):
            config.pop(key, None)
    if config["model_type"] != "llama":  # without this key, which is then 4096
        config.setdefault("sliding_window", None)


def _finish_phi3(gguf: Gguf, config: Values) -> None:
    config["sliding_window"] = config.get("sliding_window") or None


def _finish_gpt_oss(gguf: Gguf, config: Values) -> None:
    if config.get("rope_scaling"):
        config["rope_scaling"]["truncate"] = False  # as the model was trained; it is not stored


def _finish_gemma3(gguf: Gguf, config: Values) -> None:
    heads, hidden, layers = (
        config[key] for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    # The largest model scales its scores otherwise. llama.cpp knows it by its layers.
    config["query_pre_attn_scalar"] = hidden // heads if layers == 62 else config["head_dim"]
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, str | float):
        raise gguf.fail(f"'gemma3.attention.sliding_window_pattern' is {pattern!r:.60}")
    if pattern is not None and not isinstance(pattern, int):
        config["layer_types"] = [
            "sliding_attention" if sliding else "full_attention" for sliding in pattern
        ]
        del config["sliding_window_pattern"]


_WINDOW = {"attention.sliding_window": "sliding_window"}
_ARCHITECTURES: dict[str, _Architecture] = {
    "llama": _Architecture(
        "llama",
        {
            **_WINDOW,
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
        },
        finish=_finish_llama,
    ),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "qwen3moe": _Architecture(
        "qwen3_moe",
        {
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        {"norm_topk_prob": True},
    ),
    "phi3": _Architecture("phi3", _WINDOW, finish=_finish_phi3),
    "gemma3": _Architecture(
        "gemma3_text",
        {
            **_WINDOW,
            "attention.sliding_window_pattern": "sliding_window_pattern",
            "rope.freq_base_swa": "rope_local_base_freq",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        {"hidden_act": "gelu_pytorch_tanh"},
        _finish_gemma3,
    ),
    "gpt-oss": _Architecture(
        "gpt_oss",
        {
            **_WINDOW,
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
        },
        {"attention_bias": True},
        _finish_gpt_oss,
    ),
}
