"""Tiny random checkpoints of every family, and their results in `transformers`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from model.ops.mxfp4 import FP4_VALUES, dequantize_mxfp4

# Sizes that the native kernels of the CPU take: heads of 64 values.
_WIDE_HEADS: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


def _gpt_oss(head_dim: int = 16) -> Any:
    return tf.GptOssConfig(
        **_COMMON,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=head_dim,
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=20,
        max_position_embeddings=512,
        rope_parameters={**_YARN, "truncate": False},
    )


def _phi3(**options: Any) -> Any:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return tf.Phi3Config(**{**_COMMON, **sizes, **options})


def _granite(**options: Any) -> Any:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    multipliers = {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.3,
        "logits_scaling": 4.0,
    }
    biases = {"attention_bias": True, "mlp_bias": True}
    return tf.GraniteConfig(**{**_COMMON, **sizes, **biases, **multipliers, **options})


def _decoder(kind: Any, **options: Any) -> Any:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return kind(**{**_COMMON, **sizes, **options})


def _gemma(kind: Any, **options: Any) -> Any:
    sizes = {
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 20,
        "max_position_embeddings": 512,
    }
    return kind(**{**_COMMON, **sizes, **options})


_HYBRID_EXPERTS: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}


def _hybrid(kind: Any, **options: Any) -> Any:
    """Three recurrent layers and one with attention; each key head serves two value heads."""
    sizes = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 512,
    }
    return kind(**{**_COMMON, **sizes, **options})


_DEEPSEEK_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}


def _gemma4(head_dim: int = 16, **options: Any) -> Any:
    """Layers without a window have heads twice as large."""
    kind, local = options.pop("kind", tf.Gemma4TextConfig), ["sliding_attention"] * 2
    sizes = {
        "num_hidden_layers": 6,
        "layer_types": [*local, "full_attention"] * 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "global_head_dim": 2 * head_dim,
        "sliding_window": 20,
        "max_position_embeddings": 512,
        "final_logit_softcapping": 20.0,
    }
    if kind is tf.Gemma4TextConfig:
        sizes |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 512}
    return kind(**{**_COMMON, **sizes, **options})


def _gemma4_experts(head_dim: int = 16) -> Any:
    """As 26B-A4B: experts beside the dense MLP, and fewer KV heads that are also the values."""
    return _gemma4(
        head_dim,
        attention_k_eq_v=True,
        num_key_value_heads=4,
        num_global_key_value_heads=1,
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=2,
        moe_intermediate_size=32,
    )


def _gemma4_shared(head_dim: int = 16) -> Any:
    """As E2B: the last layers share keys and values, and have embeddings of their own."""
    return _gemma4(
        head_dim,
        num_key_value_heads=1,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=32,
    )


_LATENT: dict[str, Any] = {
    "kv_lora_rank": 40,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
}
# Sizes that the native kernels of the CPU take.
_LATENT_WIDE: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "embed_dim": 32,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 48,
}
_QWEN3_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}


def _text(name: str) -> dict[str, Any]:
    """The config of another family as the text part of a nested one."""
    values: dict[str, Any] = FAMILIES[name]().to_dict()
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    sections = [head_dim // 8, head_dim // 8, head_dim // 4]
    return {
        **{k: v for k, v in values.items() if k != "model_type"},
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e5,
            "mrope_section": sections,
        },
    }


# name → config. Each has fewer KV heads than query heads; windows and original contexts are shorter
# than prompts of 200 tokens.
FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt_oss-wide": lambda: _gpt_oss(32),
    "qwen2": lambda: tf.Qwen2Config(
        **_COMMON,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    "qwen2-window-yarn": lambda: tf.Qwen2Config(
        **_COMMON,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=512,
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=3,
        rope_parameters=_YARN,
    ),
    "qwen3": lambda: tf.Qwen3Config(
        **_COMMON,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **_COMMON,
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=32,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        max_position_embeddings=512,
    ),
    "qwen3_moe-unnormalized": lambda: tf.Qwen3MoeConfig(
        **_COMMON,
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=32,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        decoder_sparse_step=2,
        max_position_embeddings=512,
    ),
    "llama-llama3-rope": lambda: tf.LlamaConfig(
        **_COMMON,
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-biases-linear-rope": lambda: tf.LlamaConfig(
        **_COMMON,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    ),
    "mistral": lambda: tf.MistralConfig(
        **_COMMON,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=24,
        max_position_embeddings=512,
    ),
    "mixtral": lambda: tf.MixtralConfig(
        **_COMMON,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=None,
        max_position_embeddings=512,
    ),
    "gpt_oss": _gpt_oss,
    "phi3-longrope": lambda: _phi3(
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5],
            "long_factor": [1.0, 1.5, 2.0, 4.0, 7.0, 9.0],
        },
        tie_word_embeddings=True,
    ),
    "phi3-window": lambda: _phi3(sliding_window=24),
    "phi3-partial-rotary-wide": lambda: _phi3(
        **_WIDE_HEADS,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "gemma2": lambda: _gemma(tf.Gemma2Config, attn_logit_softcapping=5.0),
    "gemma3_text": lambda: _gemma(
        tf.Gemma3TextConfig,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    ),
    "gemma3": lambda: tf.Gemma3Config(
        text_config=_gemma(tf.Gemma3TextConfig).to_dict(), vision_config=_VISION
    ),
    "gemma4_text-experts": _gemma4_experts,
    "gemma4_text-experts-wide": lambda: _gemma4_experts(32),
    "gemma4_text-shared": _gemma4_shared,
    "gemma4_text-shared-wide": lambda: _gemma4_shared(32),
    "gemma4": lambda: tf.Gemma4Config(text_config=_gemma4_shared().to_dict()),
    "gemma4_unified": lambda: tf.Gemma4UnifiedConfig(
        text_config=_gemma4(kind=tf.Gemma4UnifiedTextConfig, attention_k_eq_v=True).to_dict()
    ),
    "mistral3": lambda: tf.Mistral3Config(
        text_config=FAMILIES["mistral"]().to_dict(),
        vision_config={"model_type": "pixtral", "head_dim": 16, **_VISION},
    ),
    "qwen2_vl": lambda: tf.Qwen2VLConfig(text_config=_text("qwen2"), vision_config=_QWEN_VISION),
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLConfig(
        text_config=_text("qwen2"), vision_config={**_QWEN_VISION, "out_hidden_size": 64}
    ),
    "qwen3_vl": lambda: tf.Qwen3VLConfig(text_config=_text("qwen3"), vision_config=_QWEN3_VISION),
    "qwen3_vl_moe": lambda: tf.Qwen3VLMoeConfig(
        text_config=_text("qwen3_moe"), vision_config=_QWEN3_VISION
    ),
    "seed_oss": lambda: _decoder(tf.SeedOssConfig, head_dim=32, attention_out_bias=True),
    "smollm3": lambda: _decoder(
        tf.SmolLM3Config, use_sliding_window=True, sliding_window=24, no_rope_layer_interval=2
    ),
    "olmo2": lambda: _decoder(tf.Olmo2Config, attention_bias=True),
    "olmo2-wide": lambda: _decoder(tf.Olmo2Config, **_WIDE_HEADS),
    "olmo3": lambda: _decoder(
        tf.Olmo3Config,
        sliding_window=24,
        rope_parameters={
            "full_attention": _YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "exaone4": lambda: _decoder(tf.Exaone4Config, sliding_window=24, sliding_window_pattern=2),
    "exaone4-full": lambda: _decoder(
        tf.Exaone4Config, sliding_window=None, layer_types=["full_attention"] * 4
    ),
    "ministral3": lambda: _decoder(
        tf.Ministral3Config, head_dim=16, rope_parameters={**_YARN, "llama_4_scaling_beta": 0.5}
    ),
    "ministral3-wide": lambda: _decoder(
        tf.Ministral3Config,
        **{**_WIDE_HEADS, "head_dim": 64},
        rope_parameters={**_YARN, "llama_4_scaling_beta": 0.5},
    ),
    "mistral3-ministral3": lambda: tf.Mistral3Config(
        text_config=FAMILIES["ministral3"]().to_dict(),
        vision_config={"model_type": "pixtral", "head_dim": 16, **_VISION},
    ),
    "hunyuan_v1_dense": lambda: _decoder(
        tf.HunYuanDenseV1Config,
        head_dim=32,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0},
    ),
    "hunyuan_v1_dense-wide": lambda: _decoder(
        tf.HunYuanDenseV1Config, **{**_WIDE_HEADS, "head_dim": 64}
    ),
    "qwen3_5_text": lambda: _hybrid(tf.Qwen3_5TextConfig),
    "qwen3_5_text-wide": lambda: _hybrid(
        tf.Qwen3_5TextConfig,
        **{**_WIDE_HEADS, "head_dim": 128, "linear_key_head_dim": 32},
    ),
    "qwen3_5_moe_text": lambda: _hybrid(tf.Qwen3_5MoeTextConfig, **_HYBRID_EXPERTS),
    "qwen3_next": lambda: _hybrid(
        tf.Qwen3NextConfig,
        **_HYBRID_EXPERTS,
        mlp_only_layers=[1],
        layer_types=["full_attention", *["linear_attention"] * 2, "full_attention"],
    ),
    "qwen3_5": lambda: tf.Qwen3_5Config(
        text_config=_hybrid(tf.Qwen3_5TextConfig, tie_word_embeddings=True).to_dict(),
        vision_config={k: v for k, v in _QWEN3_VISION.items() if "deepstack" not in k},
        tie_word_embeddings=True,
    ),
    "qwen3_5_moe": lambda: tf.Qwen3_5MoeConfig(
        text_config=_hybrid(tf.Qwen3_5MoeTextConfig, **_HYBRID_EXPERTS).to_dict(),
        vision_config={k: v for k, v in _QWEN3_VISION.items() if "deepstack" not in k},
    ),
    "qwen2_moe": lambda: _decoder(
        tf.Qwen2MoeConfig,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=24,
    ),
    "olmoe": lambda: _decoder(
        tf.OlmoeConfig, intermediate_size=32, num_experts=6, num_experts_per_tok=3
    ),
    "glm4_moe": lambda: _decoder(tf.Glm4MoeConfig, **_DEEPSEEK_EXPERTS, attention_bias=True),
    "glm4_moe-wide": lambda: _decoder(
        tf.Glm4MoeConfig,
        **{**_DEEPSEEK_EXPERTS, **_WIDE_HEADS},
        n_group=4,
        topk_group=2,
        use_qk_norm=True,
    ),
    "deepseek_v2": lambda: _decoder(
        tf.DeepseekV2Config,
        **{**_DEEPSEEK_EXPERTS, **_LATENT, "q_lora_rank": None, "num_key_value_heads": 4},
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        rope_parameters={**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek_v3": lambda: _decoder(
        tf.DeepseekV3Config,
        **{**_DEEPSEEK_EXPERTS, **_LATENT, "num_key_value_heads": 4},
        n_group=4,
        topk_group=2,
        attention_bias=True,
        rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "glm4_moe_lite": lambda: _decoder(
        tf.Glm4MoeLiteConfig,
        **{**_LATENT, **_DEEPSEEK_EXPERTS, "num_key_value_heads": 4, "v_head_dim": 48},
    ),
    "deepseek_v3-wide": lambda: _decoder(
        tf.DeepseekV3Config,
        **{**_DEEPSEEK_EXPERTS, **_LATENT_WIDE},
    ),
    "minimax_m2": lambda: _decoder(
        tf.MiniMaxM2Config,
        head_dim=32,
        intermediate_size=32,
        num_local_experts=8,
        num_experts_per_tok=3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "arcee": lambda: _decoder(tf.ArceeConfig, attention_bias=True, mlp_bias=True),
    "arcee-wide": lambda: _decoder(tf.ArceeConfig, **_WIDE_HEADS),
    "nanochat": lambda: _decoder(tf.NanoChatConfig),
    "nanochat-wide": lambda: _decoder(tf.NanoChatConfig, **_WIDE_HEADS),
    "granite": _granite,
    "granite-wide": lambda: _granite(**_WIDE_HEADS),
}


def write_checkpoint(folder: Path, name: str, max_shard_size: str = "5GB") -> Path:
    """Write a float32 checkpoint with weights large enough that attention and experts matter."""
    config = FAMILIES[name]()
    torch.manual_seed(sum(map(ord, name)))
    model = _auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, value in model.named_parameters():
            if value.dim() > 1:
                value.normal_(0, 0.4 if "embed" in parameter_name else 0.18)
            elif "bias" in parameter_name or "sinks" in parameter_name:
                value.normal_(0, 0.5)
            else:
                value.uniform_(0.5, 1.5)
        for buffer_name, value in model.named_buffers():
            if "correction" in buffer_name:
                value.normal_(0, 0.2)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def _auto_class(config: Any) -> Any:
    """The class of transformers that loads a text model, or one with other parts."""
    is_nested = hasattr(config, "text_config")
    return tf.AutoModelForImageTextToText if is_nested else tf.AutoModelForCausalLM


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a checkpoint's config.json; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    path.write_text(json.dumps(config))


def quantize_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [..., in] → blocks uint8 [..., in / 32, 16] and scales uint8 [..., in / 32]."""
    groups = weight.float().unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True))) - 2
    scaled = groups / torch.exp2(exponent)
    nearest = (scaled.abs().unsqueeze(-1) - torch.tensor(FP4_VALUES)).abs().argmin(-1)
    code = nearest.to(torch.uint8) | ((scaled < 0).to(torch.uint8) << 3)
    return code[..., 0::2] | (code[..., 1::2] << 4), (exponent.squeeze(-1) + 127).to(torch.uint8)


def write_mxfp4_pair(packed: Path, dense: Path) -> None:
    """Write a gpt-oss checkpoint with MXFP4 experts, and one with the same values dequantized."""
    write_checkpoint(packed, "gpt_oss")
    write_checkpoint(dense, "gpt_oss")
    quantized: dict[str, torch.Tensor] = {}
    dequantized: dict[str, torch.Tensor] = {}
    for name, value in load_file(packed / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = quantize_mxfp4(value.transpose(-1, -2).contiguous())
            quantized[name + "_blocks"], quantized[name + "_scales"] = blocks, scales
            values = dequantize_mxfp4(blocks, scales, torch.float32)
            dequantized[name] = values.transpose(-1, -2).contiguous()
        else:
            quantized[name] = dequantized[name] = value
    save_file(quantized, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(dequantized, dense / "model.safetensors", metadata={"format": "pt"})
    edit_config(packed, quantization_config={"quant_method": "mxfp4"})


@dataclass
class Peer:
    """A checkpoint in transformers, in float32 with eager attention."""

    folder: Path

    def __post_init__(self) -> None:
        self.model = (
            _auto_class(tf.AutoConfig.from_pretrained(self.folder))
            .from_pretrained(self.folder, dtype=torch.float32, attn_implementation="eager")
            .eval()
        )

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """Logits [tokens, vocab]."""
        return self.model(torch.tensor([ids])).logits[0]

    def is_greedy(self, prompt: list[int], output: list[int]) -> bool:
        """Whether each output token is the most likely one after all tokens before it.

        One pass over prompt and output gives the same logits as decoding token by token, except
        with longrope: there a second pass gives those of sequences within the original context.
        """
        ids = [*prompt, *output[:-1]]
        best = self.logits(ids).argmax(-1).tolist()
        rope = self.model.config.get_text_config().rope_parameters
        if rope.get("rope_type") == "longrope":
            original = rope["original_max_position_embeddings"]
            best[:original] = self.logits(ids[:original]).argmax(-1).tolist()
        return best[len(prompt) - 1 :] == output
