"""config.json → ModelConfig, one small function a family.

A key that is neither understood nor known to be harmless is refused: a silently ignored key is a
wrong answer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.config import (
    CheckpointError,
    LayerConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    conversion,
    read_json,
)

# Keys that cannot change what a forward pass computes (training, bookkeeping, generation).
_HARMLESS = frozenset(
    """architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype
    eos_token_id id2label initializer_range is_decoder is_encoder_decoder 
    keys_to_ignore_at_inference
    label2id max_length name_or_path output_attentions output_hidden_states output_router_logits
    pad_token_id pretraining_tp problem_type return_dict router_aux_loss_coef router_jitter_noise
    sep_token_id task_specific_params tokenizer_class torch_dtype torchscript transformers_version
    unk_token_id use_cache use_return_dict unsloth_fixed unsloth_version""".split()
)
_COMMON = frozenset(
    """model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps rope_theta
    rope_scaling rope_parameters tie_word_embeddings quantization_config""".split()
)


class _Keys:
    """The keys of one config.json, each error naming the file or whatever it came from."""

    def __init__(self, source: str | Path, values: dict[str, Any]):
        self.source, self.values = source, values

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {problem}")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.get(key, default)
        if value is None:
            raise self.fail(f"'{key}' is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise self.fail(f"'{key}' must be an integer of at least {least}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if value is None:
            raise self.fail(f"'{key}' is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.fail(f"'{key}' must be a number above 0, not {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(f"'{key}' must be true or false, not {value!r}")
        return value

    def refuse_unknown(self, understood: frozenset[str]) -> None:
        for key, value in self.values.items():
            if key in understood or key in _HARMLESS or key.startswith("_"):
                continue
            if value is None or value is False or value == [] or value == {}:
                continue  # switched off
            raise self.fail(
                f"'{key}' = {str(value)[:60]} is not understood and may change what the model"
                " computes; remove it from the file if it does not"
            )


def load_config(checkpoint: str | Path) -> ModelConfig:
    """Read config.json (and generation_config.json's stop ids) of a checkpoint directory.

    Raises CheckpointError for a missing or malformed file, an unknown model_type, or a key that
    changes the mathematics and is not supported.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint directory")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: contains no config.json, so it is not a checkpoint{conversion(folder)}"
        )
    stop_ids: frozenset[int] = frozenset()
    generation = folder / "generation_config.json"
    if generation.is_file():
        stop_ids = _stop_ids(_Keys(generation, read_json(generation)))
    return parse_config(read_json(path), path, stop_ids)


def parse_config(
    values: dict[str, Any], source: str | Path, stop_ids: frozenset[int] = frozenset()
) -> ModelConfig:
    """The content of a config.json → ModelConfig; `source` is what errors name.

    `stop_ids` join those of the config itself. Raises CheckpointError as load_config does.
    """
    keys = _Keys(source, values)
    family = keys.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise keys.fail(f"model_type {family!r} is not supported; known: {known}")
    own_keys, build = _FAMILIES[family]
    stop_ids |= _stop_ids(keys)
    keys.refuse_unknown(_COMMON | own_keys)
    return build(keys, stop_ids)


def _stop_ids(keys: _Keys) -> frozenset[int]:
    ids = keys.get("eos_token_id", [])
    ids = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise keys.fail(f"'eos_token_id' must be token ids, not {ids!r}")
    return frozenset(ids)


def _build(
    keys: _Keys,
    stop_ids: frozenset[int],
    *,
    windows: list[int | None],
    theta: float = 10_000.0,
    head_dim: int | None = None,
    sparse: list[bool] | None = None,
    **family: Any,
) -> ModelConfig:
    """The fields every family shares."""
    if keys.get("hidden_act", "silu") != "silu":
        raise keys.fail(f"hidden_act {keys.get('hidden_act')!r} is not supported; known: silu")
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    kv_heads = keys.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise keys.fail(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = keys.integer("head_dim", head_dim or max(1, hidden // heads))
    if head_dim % 2:
        raise keys.fail(f"head_dim {head_dim} is odd, which rotary embeddings do not allow")
    dtype = str(keys.get("dtype", keys.get("torch_dtype", "bfloat16"))).removeprefix("torch.")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise keys.fail(f"dtype {dtype!r} is not supported; known: bfloat16, float16, float32")
    mxfp4 = _quantization(keys)
    if mxfp4 and "moe" not in family:
        raise keys.fail("quantization_config mxfp4 is supported for experts only")
    return ModelConfig(
        model_type=keys.get("model_type"),
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layers=tuple(
            LayerConfig(window, is_sparse)
            for window, is_sparse in zip(
                windows, sparse or ["moe" in family] * len(windows), strict=True
            )
        ),
        rope=_rope(keys, theta),
        max_positions=keys.integer("max_position_embeddings"),
        rms_norm_eps=keys.number("rms_norm_eps"),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
        dtype=dtype,
        stop_ids=stop_ids,
        mxfp4_experts=mxfp4,
        **family,
    )


def _quantization(keys: _Keys) -> bool:
    settings = keys.get("quantization_config")
    if settings is None:
        return False
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method != "mxfp4" or keys.get("model_type") != "gpt_oss":
        raise keys.fail(
            f"quantization {method!r} is not supported; known: mxfp4 experts of gpt_oss"
        )
    return True


_ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
    },
}


def _rope(keys: _Keys, default_theta: float) -> RopeConfig:
    """Rotary parameters from `rope_parameters` (newer) or `rope_scaling` and `rope_theta`."""
    values: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        found = keys.get(key, {})
        if not isinstance(found, dict) or any(isinstance(v, dict) for v in found.values()):
            raise keys.fail(f"'{key}' must be one set of parameters for all layers, not {found!r}")
        values |= {k: v for k, v in found.items() if v is not None}
    rope = _Keys(keys.source, values)
    theta = rope.number("rope_theta", keys.number("rope_theta", default_theta))
    if theta <= 1:
        raise keys.fail(f"'rope_theta' must be above 1, not {theta}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise keys.fail(f"rope type {kind!r} is not supported; known: {', '.join(_ROPE_KEYS)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise keys.fail("'partial_rotary_factor' other than 1 is not supported")
    rope.refuse_unknown(
        frozenset(_ROPE_KEYS[kind] | {"rope_theta", "rope_type", "type", "partial_rotary_factor"})
    )
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, rope.number("factor"))
    original = rope.integer(
        "original_max_position_embeddings", keys.integer("max_position_embeddings")
    )
    if kind == "llama3":
        return RopeConfig(
            theta,
            kind,
            rope.number("factor"),
            original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    attention_factor = rope.get("attention_factor")
    return RopeConfig(
        theta,
        kind,
        rope.number("factor"),
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
        attention_factor=None if attention_factor is None else rope.number("attention_factor"),
    )


def _windows(
    keys: _Keys, window: int | None, is_sliding: Callable[[int], bool]
) -> list[int | None]:
    """Each layer's window: by `layer_types` where the config has it, else by `is_sliding`."""
    count = keys.integer("num_hidden_layers")
    types = keys.get("layer_types")
    if types is None:
        if window is None:
            return [None] * count
        return [window if is_sliding(i) else None for i in range(count)]
    if not isinstance(types, list) or len(types) != count:
        raise keys.fail(f"'layer_types' must name the kind of each of the {count} layers")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise keys.fail(
                f"layer type {kind!r} is not supported; known: full_attention, sliding_attention"
            )
        if kind == "sliding_attention" and window is None:
            raise keys.fail("a layer is of type sliding_attention but no 'sliding_window' is set")
    return [window if kind == "sliding_attention" else None for kind in types]


def _window(keys: _Keys) -> int | None:
    return None if keys.get("sliding_window") is None else keys.integer("sliding_window")


def _llama(keys: _Keys, stop_ids: frozenset[int]) -> ModelConfig:
    bias = keys.boolean("attention_bias", False)
    return _build(
        keys,
        stop_ids,
        windows=[None] * keys.integer("num_hidden_layers"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=keys.boolean("mlp_bias", False),
    )


def _mistral(keys: _Keys, stop_ids: frozenset[int]) -> ModelConfig:
    return _build(keys, stop_ids, windows=_windows(keys, _window(keys), lambda _: True))


def _mixtral(keys: _Keys, stop_ids: frozenset[int]) -> ModelConfig:
    moe = MoeConfig(
        num_experts=keys.integer("num_local_experts"),
        top_k=_top_k(keys, keys.integer("num_local_experts")),
        intermediate_size=keys.integer("intermediate_size"),
        softmax_after_top_k=False,
        normalize=True,
        biases=False,
    )
    windows = _windows(keys, _window(keys), lambda _: True)
    return _build(keys, stop_ids, windows=windows, theta=1e6, moe=moe)


def _qwen_windows(keys: _Keys) -> list[int | None]:
    window = _window(keys) if keys.boolean("use_sliding_window", False) else None
    first = keys.integer("max_window_layers", 28, least=0)
    return _windows(keys, window, lambda layer: layer >= first)


def _qwen2(keys: _Keys, stop_ids: frozenset[int]) -> ModelConfig:
    return _build(keys, stop_ids, windows=_qwen_windows(keys), qkv_bias=True)


def _qwen3(keys: _Keys, stop_ids: frozenset[int]) -> ModelConfig:
    bias = keys.boolean("attention_bias", False)
    return _build(
        keys,
        stop_ids,
        windows=_qwen_windows(keys),
        head_dim=128,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
    )


def _qwen3_moe(keys: _Keys, stop_ids: frozenset[int]) -> ModelConfig:
    count = keys.integer("num_hidden_layers")
    experts = keys.integer("num_experts", keys.get("num_local_experts"))
    step, dense = keys.integer("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    window = _window(keys) if keys.boolean("use_sliding_window", False) else None
    moe = MoeConfig(
        num_experts=experts,
        top_k=_top_k(keys, experts),
        intermediate_size=keys.integer("moe_intermediate_size"),
        softmax_after_top_k=False,
        normalize=keys.boolean("norm_topk_prob", False),
        biases=False,
    )
    bias = keys.boolean("attention_bias", False)
    return _build(
        keys,
        stop_ids,
        windows=[window] * count,
        sparse=[i not in dense and (i + 1) % step == 0 for i in range(count)],
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        moe=moe,
    )


def _gpt_oss(keys: _Keys, stop_ids: frozenset[int]) -> ModelConfig:
    bias = keys.boolean("attention_bias", True)
    experts = keys.integer("num_local_experts")
    moe = MoeConfig(
        num_experts=experts,
        top_k=_top_k(keys, experts),
        intermediate_size=keys.integer("intermediate_size"),
        softmax_after_top_k=True,
        normalize=False,
        biases=True,
        interleaved=True,
    )
    return _build(
        keys,
        stop_ids,
        windows=_windows(keys, _window(keys), lambda layer: layer % 2 == 0),
        theta=150_000.0,
        head_dim=64,
        sinks=True,
        qkv_bias=bias,
        o_bias=bias,
        swiglu_limit=keys.number("swiglu_limit", 7.0),
        swiglu_alpha=keys.number("swiglu_alpha", 1.702),
        moe=moe,
    )


def _top_k(keys: _Keys, experts: int) -> int:
    top_k = keys.integer("num_experts_per_tok", keys.get("experts_per_token"))
    if top_k > experts:
        raise keys.fail(f"num_experts_per_tok {top_k} is more than the {experts} experts")
    return top_k


_QWEN_WINDOW_KEYS = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
_FAMILIES: dict[str, tuple[frozenset[str], Callable[[_Keys, frozenset[int]], ModelConfig]]] = {
    "llama": (frozenset({"attention_bias", "mlp_bias"}), _llama),
    "mistral": (frozenset({"sliding_window", "layer_types"}), _mistral),
    "mixtral": (
        frozenset({"sliding_window", "layer_types", "num_local_experts", "num_experts_per_tok"}),
        _mixtral,
    ),
    "qwen2": (frozenset(_QWEN_WINDOW_KEYS), _qwen2),
    "qwen3": (frozenset(_QWEN_WINDOW_KEYS | {"attention_bias"}), _qwen3),
    "qwen3_moe": (
        frozenset(
            _QWEN_WINDOW_KEYS
            | {
                "attention_bias",
                "decoder_sparse_step",
                "mlp_only_layers",
                "moe_intermediate_size",
                "norm_topk_prob",
                "num_experts",
                "num_local_experts",
                "num_experts_per_tok",
            }
        ),
        _qwen3_moe,
    ),
    "gpt_oss": (
        frozenset(
            {
                "attention_bias",
                "experts_per_token",
                "initial_context_length",
                "layer_types",
                "num_experts_per_tok",
                "num_local_experts",
                "sliding_window",
                "swiglu_alpha",
                "swiglu_limit",
            }
        ),
        _gpt_oss,
    ),
}
