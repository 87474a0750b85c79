"""Configs of well-known models, for planning without a download.

Each has the keys of the model's config.json on Hugging Face that affect costs; of models with
vision towers, those of the text model. Base and instruct models have the same shape; if their
context lengths differ, the one of the instruct model is given.
"""

import difflib
import re
from typing import Any

from model.config import ModelConfig
from model.families import parse_config

# Columns: name, model_type, hidden size, MLP size (of one expert, if there are experts), layers,
# heads, KV heads, head dimension, vocabulary, context length, rope theta, tied embeddings.
_SHAPES = """
gemma-2-2b           gemma2     2304  9216  26   8  4 256 256000   8192 1e4   tied
gemma-2-9b           gemma2     3584 14336  42  16  8 256 256000   8192 1e4   tied
gemma-2-27b          gemma2     4608 36864  46  32 16 128 256000   8192 1e4   tied
gemma-3-1b           gemma3_text 1152 6912  26   4  1 256 262144  32768 1e6   tied
gemma-3-4b           gemma3_text 2560 10240 34   8  4 256 262208 131072 1e6   tied
gemma-3-12b          gemma3_text 3840 15360 48  16  8 256 262208 131072 1e6   tied
gemma-3-27b          gemma3_text 5376 21504 62  32 16 128 262208 131072 1e6   tied
gemma-4-e2b          gemma4_text 1536 6144  35   8  1 256 262144 131072 1e6   tied
gemma-4-26b-a4b      gemma4_text 2816 2112  30  16  8 256 262144 262144 1e6   tied
gemma-4-31b          gemma4_text 5376 21504 60  32 16 256 262144 262144 1e6   tied
granite-3.3-8b       granite    4096 12800  40  32  8 128  49159 131072 1e7   tied
llama-2-7b           llama      4096 11008  32  32 32 128  32000   4096 1e4
llama-3-8b           llama      4096 14336  32  32  8 128 128256   8192 5e5
llama-3.1-8b         llama      4096 14336  32  32  8 128 128256 131072 5e5
llama-3.1-70b        llama      8192 28672  80  64  8 128 128256 131072 5e5
llama-3.1-405b       llama     16384 53248 126 128  8 128 128256 131072 5e5
llama-3.2-1b         llama      2048  8192  16  32  8  64 128256 131072 5e5   tied
llama-3.2-3b         llama      3072  8192  28  24  8 128 128256 131072 5e5   tied
llama-3.3-70b        llama      8192 28672  80  64  8 128 128256 131072 5e5
mistral-7b-v0.1      mistral    4096 14336  32  32  8 128  32000  32768 1e4
mistral-7b-v0.3      mistral    4096 14336  32  32  8 128  32768  32768 1e6
mixtral-8x7b-v0.1    mixtral    4096 14336  32  32  8 128  32000  32768 1e6
phi-3.5-mini         phi3       3072  8192  32  32 32  96  32064 131072 1e4
phi-4                phi3       5120 17920  40  40 10 128 100352  16384 2.5e5
phi-4-mini           phi3       3072  8192  32  24  8 128 200064 131072 1e4   tied
qwen2-0.5b           qwen2       896  4864  24  14  2  64 151936  32768 1e6   tied
qwen2.5-0.5b         qwen2       896  4864  24  14  2  64 151936  32768 1e6   tied
qwen2.5-1.5b         qwen2      1536  8960  28  12  2 128 151936  32768 1e6   tied
qwen2.5-3b           qwen2      2048 11008  36  16  2 128 151936  32768 1e6   tied
qwen2.5-7b           qwen2      3584 18944  28  28  4 128 152064  32768 1e6
qwen2.5-14b          qwen2      5120 13824  48  40  8 128 152064  32768 1e6
qwen2.5-32b          qwen2      5120 27648  64  40  8 128 152064  32768 1e6
qwen2.5-72b          qwen2      8192 29568  80  64  8 128 152064  32768 1e6
qwen3-0.6b           qwen3      1024  3072  28  16  8 128 151936  40960 1e6   tied
qwen3-1.7b           qwen3      2048  6144  28  16  8 128 151936  40960 1e6   tied
qwen3-4b             qwen3      2560  9728  36  32  8 128 151936  40960 1e6   tied
qwen3-4b-2507        qwen3      2560  9728  36  32  8 128 151936 262144 5e6   tied
qwen3-8b             qwen3      4096 12288  36  32  8 128 151936  40960 1e6
qwen3-14b            qwen3      5120 17408  40  40  8 128 151936  40960 1e6
qwen3-32b            qwen3      5120 25600  64  64  8 128 151936  40960 1e6
qwen3-next-80b-a3b   qwen3_next 2048   512  48  16  2 256 151936 262144 1e7
qwen3.5-0.8b         qwen3_5_text 1024 3584 24   8  2 256 248320 262144 1e7   tied
qwen3.5-9b           qwen3_5_text 4096 12288 32 16  4 256 248320 262144 1e7
qwen3.5-27b          qwen3_5_text 5120 17408 64 24  4 256 248320 262144 1e7
qwen3.5-35b-a3b      qwen3_5_moe_text 2048 512 40 16 2 256 248320 262144 1e7
qwen3-30b-a3b        qwen3_moe  2048   768  48  32  4 128 151936  40960 1e6
qwen3-30b-a3b-2507   qwen3_moe  2048   768  48  32  4 128 151936 262144 1e7
qwen3-coder-30b-a3b  qwen3_moe  2048   768  48  32  4 128 151936 262144 1e7
qwen3-235b-a22b      qwen3_moe  4096  1536  94  64  4 128 151936  40960 1e6
qwen3-235b-a22b-2507 qwen3_moe  4096  1536  94  64  4 128 151936 262144 5e6
qwen1.5-moe-a2.7b    qwen2_moe  2048  5632  24  16 16 128 151936  32768 1e6
olmoe-1b-7b          olmoe      2048  1024  16  16 16 128  50304   4096 1e4
glm-4.5-air          glm4_moe   4096 10944  46  96  8 128 151552 131072 1e6
deepseek-v2-lite     deepseek_v2 2048 10944 27 16 16  64 102400 163840 1e4
deepseek-v3          deepseek_v3 7168 18432 61 128 128 64 129280 163840 1e4
kimi-k2              kimi_k2    7168 18432  61  64 64  64 163840 131072 5e4
glm-4.7-flash        glm4_moe_lite 2048 10240 47 20 20 64 154880 202752 1e6
gpt-oss-20b          gpt_oss    2880  2880  24  64  8  64 201088 131072 1.5e5
gpt-oss-120b         gpt_oss    2880  2880  36  64  8  64 201088 131072 1.5e5
"""


def _qwen3_moe(mlp: int, expert: int) -> dict[str, Any]:
    """Return the keys of experts; mlp: the published size of dense MLPs, which no layer has."""
    return {
        "intermediate_size": mlp,
        "moe_intermediate_size": expert,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    }


def _deepseek_yarn(mscale: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


_GEMMA3 = {"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
_GEMMA4 = {  # of the models without per-layer embeddings
    "sliding_window": 1024,
    "final_logit_softcapping": 30.0,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
}
_GPT_OSS = {
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "quantization_config": {"quant_method": "mxfp4"},
}
# What the columns do not say, by the beginning of the name.
_MORE: dict[str, dict[str, Any]] = {
    "gemma-2-27b": {"query_pre_attn_scalar": 144},
    "gemma-3-1b": {"sliding_window": 512},
    "gemma-3-4b": _GEMMA3,
    "gemma-3-12b": _GEMMA3,
    "gemma-3-27b": {**_GEMMA3, "query_pre_attn_scalar": 168},
    "gemma-4-e2b": {
        "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
        "final_logit_softcapping": 30.0,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
    },
    "gemma-4-26b-a4b": {
        **_GEMMA4,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 704,
    },
    "gemma-4-31b": {**_GEMMA4, "num_global_key_value_heads": 4},
    "granite-3.3-8b": {
        "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12.0,
        "logits_scaling": 16.0,
        "residual_multiplier": 0.22,
    },
    "mistral-7b-v0.1": {"sliding_window": 4096},
    "mistral-7b-v0.3": {"sliding_window": None},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "phi-4-mini": {"partial_rotary_factor": 0.75},
    "qwen3-next-80b": {"intermediate_size": 5120},
    "qwen3.5-0.8b": {"linear_num_value_heads": 16},
    "qwen3.5-27b": {"linear_num_value_heads": 48},
    "qwen3-30b": _qwen3_moe(mlp=6144, expert=768),
    "qwen3-coder-30b": _qwen3_moe(mlp=5472, expert=768),
    "qwen3-235b": _qwen3_moe(mlp=12_288, expert=1536),
    "qwen1.5-moe": {
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
    },
    "olmoe": {"num_experts": 64, "num_experts_per_tok": 8},
    "glm-4.5-air": {"attention_bias": True, "num_experts_per_tok": 8},
    "deepseek-v2-lite": {
        "q_lora_rank": None,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 6,
        "rope_scaling": _deepseek_yarn(0.707),
    },
    "deepseek-v3": {"rope_scaling": _deepseek_yarn(1.0)},
    "kimi-k2": {
        "n_routed_experts": 384,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "rope_scaling": {**_deepseek_yarn(1.0), "factor": 32.0, "beta_fast": 1.0},
    },
    "gpt-oss-20b": {**_GPT_OSS, "num_local_experts": 32},
    "gpt-oss-120b": {**_GPT_OSS, "num_local_experts": 128},
}
_ALIASES = {"mistral-7b": "mistral-7b-v0.3", "mixtral-8x7b": "mixtral-8x7b-v0.1"}
# Parts of a published name that do not change the shape.
_IGNORED_WORDS = frozenset("base chat hf instruct it meta pt thinking".split())
_MAX_SUGGESTIONS = 3


def _config(line: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the keys of config.json of a line of the table."""
    name, model_type, *sizes, theta = line.removesuffix("tied").split()
    hidden, mlp, layers, heads, kv_heads, head_dim, vocab, positions = map(int, sizes)
    config = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6 if name.startswith(("gemma", "qwen")) else 1e-5,
        "rope_theta": float(theta),
        "tie_word_embeddings": line.endswith("tied"),
        "torch_dtype": "bfloat16",
    }
    for beginning, more in _MORE.items():
        if name.startswith(beginning):
            config |= more
    return name, config


KNOWN_CONFIGS: dict[str, dict[str, Any]] = dict(map(_config, _SHAPES.strip().splitlines()))


def named_config(name: str) -> ModelConfig:
    """Return the config of a model in KNOWN_CONFIGS. Raises KeyError for any other name."""
    return parse_config(KNOWN_CONFIGS[name], name)


def find_known_model(spelling: str) -> str | None:
    """Return the name in KNOWN_CONFIGS of a model by its usual spelling, or None.

    Case, separators, the owner before a slash and words like -Instruct do not matter:
    `Qwen/Qwen3-0.6B` and `meta-llama/Llama-3.1-8B-Instruct` are known.
    """
    return _BY_KEY.get(_key(spelling))


def closest_known_models(spelling: str) -> list[str]:
    """Return the names in KNOWN_CONFIGS that are closest to `spelling`, closest first, or none."""
    key = _key(spelling)
    found = difflib.get_close_matches(key, _BY_KEY, len(_BY_KEY))
    # `gpt-oss` is the beginning of a name, and `llama-3.1-8b-awq` begins with one.
    begun = [known for known in _BY_KEY if key and known.startswith(key)]
    begun += sorted((known for known in _BY_KEY if key.startswith(known)), key=len, reverse=True)
    names = dict.fromkeys(_BY_KEY[known] for known in [*begun, *found])
    return [*names][:_MAX_SUGGESTIONS]


def _key(spelling: str) -> str:
    """Return a form that is the same for all spellings of a name.

    Separators matter between two digits only: qwen2.5-7b and qwen2-57b are different models.
    """
    name = re.sub(r"^[\w-][\w.-]*/(?=[^/]+$)", "", spelling.strip().lower())
    words = [word for word in re.split(r"[\s_.:-]+", name) if word not in _IGNORED_WORDS]
    return re.sub(r"(?<=\d) (?=\d)", ".", " ".join(words)).replace(" ", "")


_BY_KEY = {_key(name): name for name in KNOWN_CONFIGS} | {
    _key(alias): name for alias, name in _ALIASES.items()
}
