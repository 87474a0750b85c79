"""Family: the declaration in each family's module, and the config keys that all families share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.config import DTYPES, LayerConfig, ModelConfig
from model.families.config_keys.keys import Keys
from model.families.config_keys.rope_keys import read_rope
from model.families.tensor_names import ExpertNames, TensorNames
from model.formats import QUANTIZATIONS
from model.ops.specs import Activation, NormSpec

# The keys that every family understands, and their values where they are missing; None: no value.
# The sizes have none: every config states them, and a wrong number of heads would not be noticed.
_DEFAULTS: dict[str, Any] = {
    "model_type": None,
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "max_position_embeddings": None,
    "rms_norm_eps": None,
    "num_key_value_heads": None,  # as many as query heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "original_max_position_embeddings": None,
    "partial_rotary_factor": None,
    "tie_word_embeddings": False,
    "quantization_config": None,
}
_SWIGLU = {"silu": Activation(), "swish": Activation()}  # two names of one function
_DTYPE_NAMES: dict[str, str | None] = {"half": "float16", "float": "float32", "auto": None}


@dataclass(frozen=True)
class Family:
    """One family: its config keys, their meaning, and the names of its tensors."""

    # The keys that it understands in addition to _DEFAULTS, or whose values differ where they are
    # missing: those that the family's config class in transformers gives them.
    defaults: Mapping[str, Any]
    fields: Callable[[Keys], dict[str, Any]]  # → the fields of ModelConfig that differ from Llama
    names: TensorNames = field(default_factory=TensorNames)
    neutral: Mapping[str, Any] = field(default_factory=dict)  # keys that must have this value
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of keys
    # The values of `hidden_act` that are supported.
    activations: Mapping[str, Activation] = field(default_factory=lambda: _SWIGLU)
    norm_offset: float = 0.0  # see NormSpec
    norm_weights: bool = True  # see NormSpec
    partial_rotary: bool = False  # `partial_rotary_factor` is supported
    # The experts of a family that stores them in one tensor for all, where each has its own.
    single_experts: ExpertNames | None = None
    others: tuple[str, ...] = ()  # beginnings of the names of stored tensors that are not used
    rope_aliases: Mapping[str, str] = field(default_factory=dict)  # rope types by other names

    def config(self, keys: Keys, stop_ids: frozenset[int] | None) -> ModelConfig:
        """The config of a checkpoint of this family. Raises CheckpointError.

        stop_ids: those of generation_config.json; None: the checkpoint has none, so that the
        family's default counts if the config has no stop ids either.
        """
        keys = self._with_defaults(keys)
        own_stop_ids = keys.token_ids("eos_token_id")
        if stop_ids is not None and "eos_token_id" not in keys.values:
            own_stop_ids = frozenset()
        own = self.fields(keys)
        activation = keys.get("hidden_act")
        if not isinstance(activation, str) or activation not in self.activations:
            known = next(iter(self.activations))
            raise keys.fail(f"hidden_act {activation!r} is not supported; supported: {known}")
        hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        kv_heads = keys.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise keys.fail(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        head_dim = keys.integer("head_dim", max(1, hidden // heads))
        if head_dim % 2:
            raise keys.fail(f"head_dim {head_dim} must be even for rotary embeddings")
        if "rope" not in own:
            own["rope"], own["rotary_dim"] = read_rope(
                keys, head_dim, self.partial_rotary, self.rope_aliases
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
            "max_positions": positions,
            "norm": NormSpec(keys.number("rms_norm_eps"), self.norm_offset, self.norm_weights),
            "activation": self.activations[activation],
            "tie_word_embeddings": keys.boolean("tie_word_embeddings"),
            "dtype": stated_dtype(keys) or "bfloat16",
            "stop_ids": own_stop_ids | (stop_ids or frozenset()),
        }
        return ModelConfig(**shared | own | _formats(keys, has_experts="moe" in own))

    def _with_defaults(self, keys: Keys) -> Keys:
        """The keys by their own names, with the family's defaults; all of them are understood."""
        values, defaults = dict(keys.values), {**_DEFAULTS, **self.defaults}
        for alias, key in self.aliases.items():
            value = values.pop(alias, None)
            if value is not None and values.setdefault(key, value) != value:
                raise keys.fail(f"'{alias}' is {value!r} but '{key}' is {values[key]!r}")
        keys = Keys(keys.source, values, defaults)
        keys.refuse_unknown(defaults, self.neutral)
        return keys


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
    first = keys.integer("max_window_layers", minimum=0)
    return layers(keys, qwen_window(keys), lambda layer: layer >= first)


def qwen_window(keys: Keys) -> int | None:
    """The window, if `use_sliding_window` switches it on."""
    is_used = keys.boolean("use_sliding_window")
    return keys.optional_integer("sliding_window") if is_used else None


def attention_biases(keys: Keys) -> dict[str, Any]:
    """The fields that `attention_bias` sets: biases of q, k, v and of the output."""
    bias = keys.boolean("attention_bias")
    return {"qkv_bias": bias, "o_bias": bias}


def stated_dtype(keys: Keys) -> str | None:
    """The dtype that the config states, one of DTYPES; None if it leaves it to the weights."""
    stated = str(keys.get("dtype", keys.get("torch_dtype", "auto"))).removeprefix("torch.")
    name = _DTYPE_NAMES.get(stated, stated)
    if name is not None and name not in DTYPES:
        raise keys.fail(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return name


def _formats(keys: Keys, has_experts: bool) -> dict[str, Any]:
    """The field with the formats of a quantized checkpoint; empty if it is not quantized."""
    settings = keys.get("quantization_config")
    if settings is None or settings == {}:
        return {}
    if not isinstance(settings, dict):
        settings = {"quant_method": settings}
    method = settings.get("quant_method")
    if method is None and any(settings.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise keys.fail(
            f"quantization {method!r:.60} is not supported; supported: {known}, or the model's "
            "checkpoint in 16 bits, which can be quantized as it is loaded"
        )
    if method == "mxfp4" and not has_experts:
        raise keys.fail(f"quantization {method!r} is supported for experts only")
    return {"stored_formats": QUANTIZATIONS[method](keys.inside("quantization_config", settings))}
