"""ModelConfig: everything the decoder, the loader and the cost model know of a checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_JSON_BYTES = 64 << 20  # no config is near this; a file this large is something else


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message names the file, what is wrong and what is known."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency and how it is stretched beyond the original context."""

    theta: float
    kind: str = "default"  # default, linear, llama3 or yarn
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    attention_factor: float | None = None  # yarn: multiplies cos and sin; None: from `factor`


@dataclass(frozen=True)
class MoeConfig:
    """Sparse mixture-of-experts MLP."""

    num_experts: int
    top_k: int
    intermediate_size: int
    softmax_after_top_k: bool  # gpt-oss: softmax over the chosen logits; else over all experts
    normalize: bool  # the chosen weights are divided by their sum
    biases: bool  # router and experts have biases
    interleaved: bool = False  # the checkpoint's gate and up rows alternate (gpt-oss)


@dataclass(frozen=True)
class LayerConfig:
    """What differs from layer to layer."""

    window: int | None  # sliding attention window in tokens, the token itself included
    sparse: bool  # MoE rather than dense MLP


@dataclass(frozen=True)
class ModelConfig:
    """Everything the decoder, the loader and the engine need to know of a model."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of dense MLPs
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    rope: RopeConfig
    max_positions: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    dtype: str  # the checkpoint's own: bfloat16, float16 or float32
    stop_ids: frozenset[int]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each query and key head before rotary
    sinks: bool = False  # one learned logit a query head joins the softmax
    swiglu_limit: float | None = None  # gpt-oss: clamped, (up + 1) · gate · sigmoid(alpha · gate)
    swiglu_alpha: float = 1.0
    moe: MoeConfig | None = None
    mxfp4_experts: bool = False


def conversion(folder: Path) -> str:
    """What to do about weights in a format that is not read; empty where there are none."""
    if any(folder.glob("*.gguf")):
        return "; GGUF is not read: take the safetensors that it was made from"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        return (
            "; PyTorch's own files are not read, as they can run code. Convert them once: python -c"
            ' "from transformers import AutoModelForCausalLM as M;'
            f" M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}')\""
        )
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint; raises CheckpointError."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: too large to be a configuration file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: does not contain a JSON object")
    return value
