"""Family: the declaration in each family's module, and the config keys that all families share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.config import DTYPES, LayerConfig, ModelConfig, MoeConfig
from model.families.keys import Keys
from model.families.rope_keys import read_rope
from model.families.tensor_names import TensorNames
from model.formats import QUANTIZATIONS
from model.ops.specs import NormSpec, RouterSpec

_COMMON_KEYS = frozenset(
    """model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps rope_theta
    rope_scaling rope_parameters tie_word_embeddings quantization_config""".split()
)


@dataclass(frozen=True)
class Family:
    """One family: its config keys, their meaning, and the names of its tensors."""

    keys: str  # understood in addition to those that every family shares, separated by spaces
    fields: Callable[[Keys], dict[str, Any]]  # → the fields of ModelConfig that differ from Llama
    names: TensorNames = field(default_factory=TensorNames)
    rope_theta: float = 10_000.0  # where the config has none
    head_dim: int | None = None  # where the config has none; None: hidden_size / heads
    partial_rotary: bool = False  # `partial_rotary_factor` is supported
    rope_aliases: Mapping[str, str] = field(default_factory=dict)  # rope types by other names

    def config(self, keys: Keys, stop_ids: frozenset[int]) -> ModelConfig:
        """The config of a checkpoint of this family. Raises CheckpointError."""
        stop_ids |= keys.token_ids("eos_token_id")
        keys.refuse_unknown(_COMMON_KEYS.union(self.keys.split()))
        own = self.fields(keys)
        if keys.get("hidden_act", "silu") != "silu":
            raise keys.fail(
                f"hidden_act {keys.get('hidden_act')!r} is not supported; supported: silu"
            )
        hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        kv_heads = keys.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise keys.fail(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        head_dim = keys.integer("head_dim", self.head_dim or max(1, hidden // heads))
        if head_dim % 2:
            raise keys.fail(f"head_dim {head_dim} must be even for rotary embeddings")
        rope, rotary_dim = read_rope(
            keys, self.rope_theta, head_dim, self.partial_rotary, self.rope_aliases
        )
        positions = keys.integer("max_position_embeddings")
        # A window that contains every position is not a window.
        own["layers"] = tuple(
            replace(layer, window=None) if (layer.window or 0) >= positions else layer
            for layer in own.get("layers") or layers(keys)
        )
        shared = {
            "model_type": keys.get("model_type"),
            "vocab_size": keys.integer("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": keys.integer("intermediate_size"),
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "rotary_dim": rotary_dim,
            "rope": rope,
            "max_positions": positions,
            "norm": NormSpec(keys.number("rms_norm_eps")),
            "tie_word_embeddings": keys.boolean("tie_word_embeddings", False),
            "dtype": _dtype(keys),
            "stop_ids": stop_ids,
        }
        return ModelConfig(**shared | own | _formats(keys, has_experts="moe" in own))


def layers(
    keys: Keys,
    window: int | None = None,
    is_sliding: Callable[[int], bool] = lambda layer: True,
    *,
    sparse: bool = False,
) -> tuple[LayerConfig, ...]:
    """Every layer, with its window by `layer_types` if the config has it, else by `is_sliding`.

    sparse: all layers have experts.
    """
    count = keys.integer("num_hidden_layers")
    types = keys.get("layer_types")
    if types is None:
        windows = [window if is_sliding(layer) else None for layer in range(count)]
        return tuple(LayerConfig(own, sparse) for own in windows)
    if not isinstance(types, list) or len(types) != count:
        raise keys.fail(f"'layer_types' must list one type for each of the {count} layers")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise keys.fail(
                f"layer type {kind!r} is not supported;"
                " supported: full_attention, sliding_attention"
            )
        if kind == "sliding_attention" and window is None:
            raise keys.fail("a layer is of type sliding_attention but 'sliding_window' is not set")
    return tuple(
        LayerConfig(window if kind == "sliding_attention" else None, sparse) for kind in types
    )


def qwen_layers(keys: Keys) -> tuple[LayerConfig, ...]:
    """Every layer, with the window of those from `max_window_layers` on."""
    is_used = keys.boolean("use_sliding_window", False)
    first = keys.integer("max_window_layers", 28, minimum=0)
    window = keys.optional_integer("sliding_window") if is_used else None
    return layers(keys, window, lambda layer: layer >= first)


def attention_biases(keys: Keys, default: bool = False) -> dict[str, Any]:
    """The fields that `attention_bias` sets: biases of q, k, v and of the output."""
    bias = keys.boolean("attention_bias", default)
    return {"qkv_bias": bias, "o_bias": bias}


def softmax_moe(keys: Keys, experts: int, size: int, normalize: bool) -> MoeConfig:
    """Experts without biases whose router weights are a softmax over all experts."""
    return MoeConfig(
        num_experts=experts,
        intermediate_size=size,
        router=RouterSpec(top_k(keys, experts), softmax_after_top_k=False, normalize=normalize),
        biases=False,
    )


def top_k(keys: Keys, experts: int) -> int:
    """Experts of each token. Raises CheckpointError if there are fewer."""
    count = keys.integer("num_experts_per_tok", keys.get("experts_per_token"))
    if count > experts:
        raise keys.fail(f"num_experts_per_tok {count} is more than the {experts} experts")
    return count


def _formats(keys: Keys, has_experts: bool) -> dict[str, Any]:
    """The fields with the formats of a quantized checkpoint; empty if it is not quantized."""
    settings = keys.get("quantization_config")
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        settings = {"quant_method": settings}
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise keys.fail(f"quantization {method!r} is not supported; supported: {known}")
    formats = QUANTIZATIONS[method](settings)
    if "expert_format" in formats and not has_experts:
        raise keys.fail(f"quantization {method!r} is supported for experts only")
    return formats


def _dtype(keys: Keys) -> str:
    name = str(keys.get("dtype", keys.get("torch_dtype", "bfloat16"))).removeprefix("torch.")
    if name not in DTYPES:
        raise keys.fail(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return name
