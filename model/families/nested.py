"""The text models of checkpoints that also have other parts, such as a vision tower.

The text model's config is in `text_config`, or, in older files, among the keys of the whole. Its
tensors have a prefix. Rotary embeddings with positions in time, height and width ("mrope") are
plain ones for text, whose three positions are equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.families.config_keys.keys import Keys
from model.families.qwen3_next import MTP
from model.families.tensor_names import ExpertNames, TensorNames

# Keys of the whole that also count for the text model, and that its own values must not contradict.
_SHARED = ("tie_word_embeddings", "quantization_config", "eos_token_id", "dtype", "torch_dtype")
# Keys of the other parts, where those of the text model are beside them.
_OTHER = (
    *("vision_config", "audio_config", "image_token_id", "video_token_id", "vision_token_id"),
    *("vision_start_token_id", "vision_end_token_id"),
)
_QWEN_VL = {
    "num_key_value_heads": 8,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
_QWEN3_VL = {"max_position_embeddings": 128_000, "rope_theta": 5e5}


@dataclass(frozen=True)
class Nested:
    """One model_type of such checkpoints."""

    text: str  # the family of the text model, unless its config names one of `other_texts`
    defaults: Mapping[str, Any] = field(default_factory=dict)  # that differ from the family's
    # Beginnings of the names of tensors that are not the text model's.
    others: tuple[str, ...] = ("model.visual.", "visual.")
    experts: ExpertNames | None = None  # if they differ from the family's
    other_texts: tuple[str, ...] = ()


_LLAVA = tuple(
    f"{start}{part}."
    for start in ("", "model.")
    for part in ("vision_tower", "multi_modal_projector")
)
_GEMMA4 = tuple(
    f"{start}{part}."
    for start in ("", "model.")
    for part in ("vision_tower", "audio_tower", "vision_embedder", "embed_vision", "embed_audio")
)
NESTED = {
    "gemma3": Nested("gemma3_text", others=_LLAVA),
    "gemma4": Nested("gemma4_text", others=_GEMMA4),
    "gemma4_unified": Nested(
        "gemma4_text",
        {
            "max_position_embeddings": 262_144,
            "sliding_window": 1024,
            "hidden_size_per_layer_input": 0,
        },
        others=_GEMMA4,
    ),
    "mistral3": Nested("mistral", others=_LLAVA, other_texts=("ministral3",)),
    "qwen2_5_vl": Nested("qwen2", _QWEN_VL),
    "qwen2_vl": Nested("qwen2", _QWEN_VL),
    "qwen3_5": Nested("qwen3_5_text", others=("model.visual.", "visual.", *MTP)),
    "qwen3_5_moe": Nested("qwen3_5_moe_text", others=("model.visual.", "visual.", *MTP)),
    "qwen3_vl": Nested("qwen3", {**_QWEN3_VL, "head_dim": 128}),
    "qwen3_vl_moe": Nested(
        "qwen3_moe",
        {
            **_QWEN3_VL,
            "num_key_value_heads": 16,
            "moe_intermediate_size": 1408,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
        },
        experts=ExpertNames(
            linears=(
                ("mlp.experts.gate_up_proj", ("gate", "up")),
                ("mlp.experts.down_proj", ("down",)),
            ),
            transposed=True,
        ),
    ),
}


def text_keys(keys: Keys, nested: Nested) -> Keys:
    """The keys of the text model as its family understands them. Raises CheckpointError."""
    own = keys.get("text_config")
    if own is None:
        text = {key: value for key, value in keys.values.items() if key not in _OTHER}
    elif isinstance(own, dict):
        shared = {key: keys.values[key] for key in _SHARED if keys.get(key) is not None}
        text = {**own, **shared}
    else:
        raise keys.fail(f"'text_config' must be an object, not {own!r:.60}")
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(text.get(key), dict):
            text[key] = _plain(text[key])
    return Keys(keys.source, {**text, "model_type": text_family(keys, nested)})


def text_family(keys: Keys, nested: Nested) -> str:
    """The name of the text model's family."""
    own = keys.get("text_config")
    stated = own.get("model_type") if isinstance(own, dict) else None
    return stated if stated in nested.other_texts else nested.text


def _plain(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters without what concerns positions in images."""
    rope = {k: v for k, v in rope.items() if k not in ("mrope_section", "mrope_interleaved")}
    return {k: "default" if v == "mrope" else v for k, v in rope.items()}


def nested_names(names: TensorNames, nested: Nested) -> tuple[TensorNames, ...]:
    """The names under which the text model's tensors may be stored, newer forms last."""
    if nested.experts is not None:
        names = replace(names, experts=nested.experts)
    return names, names.under("language_model."), names.within("language_model")
