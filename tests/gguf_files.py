"""Writes tiny checkpoints as GGUF files, with names and quantization of the package gguf."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel

ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "phi3": "phi3",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
}
VOCABULARY = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab", "abc"]
MERGES = ["a b", "ab c"]


def write_gguf(
    folder: Path,
    path: Path,
    kind_of: Callable[[str, np.ndarray], Kind] = lambda name, values: Kind.F32,
    *,
    split_tensors: int = 0,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Write the checkpoint of a directory, and its tokenizer if it has a byte-level one, as `path`.

    kind_of: the type of a tensor by its name in the file. change: adds metadata. split_tensors:
    tensors of a file, of which there are then several.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_tensors)
    _add_metadata(writer, config)
    if (folder / "tokenizer.json").exists():
        _add_tokenizer_of(writer, folder, config["vocab_size"])
    else:
        _add_tokenizer(writer, config["vocab_size"])
    change(writer)
    for name, tensor in _tensors(folder, config, arch):
        values = tensor.float().contiguous().numpy()
        kind = kind_of(name, values) if values.ndim > 1 else Kind.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(folder: Path, config: dict[str, Any], arch: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors by the package's names, with the changes that llama.cpp's converter makes."""
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    stacks: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        for own_name, own in _divided(name, tensor):
            found = names.get_name(own_name, try_suffixes=(".weight", ".bias"))
            if found is None and ".experts." in own_name:
                start, _, rest = own_name.partition(".experts.")
                expert, _, rest = rest.partition(".")
                whole = names.get_name(f"{start}.experts.{rest}", try_suffixes=(".weight",))
                whole = whole or names.get_name(
                    own_name.replace(f".{expert}.", ".0."), (".weight",)
                )
                assert whole is not None, own_name
                stacks.setdefault(whole, []).append((int(expert), own))
                continue
            assert found is not None, own_name
            if arch == "llama" and ("attn_q." in found or "attn_k." in found):
                heads = config["num_attention_heads" if "_q." in found else "num_key_value_heads"]
                own = own.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(own.shape)
            if arch == "gemma3" and found.endswith("norm.weight"):
                own = own + 1
            yield found, own
    for name, experts in stacks.items():
        yield name, torch.stack([own for _, own in sorted(experts, key=lambda entry: entry[0])])
    yield from _rope_factors(config)


def _divided(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """gpt-oss's tensors with gate and up apart, and not transposed; others as they are."""
    stem, _, last = name.rpartition(".")
    if name.endswith(".sinks"):
        yield f"{name}.weight", tensor
    elif last in ("gate_up_proj", "down_proj"):
        weight = tensor.transpose(-1, -2)
        if last == "down_proj":
            yield f"{stem}.down_proj.weight", weight
        else:
            yield f"{stem}.gate_proj.weight", weight[:, 0::2]
            yield f"{stem}.up_proj.weight", weight[:, 1::2]
    elif last == "gate_up_proj_bias":
        yield f"{stem}.gate_proj.bias", tensor[:, 0::2]
        yield f"{stem}.up_proj.bias", tensor[:, 1::2]
    elif last == "down_proj_bias":
        yield f"{stem}.down_proj.bias", tensor
    else:
        yield name, tensor


def _rope_factors(config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    rope = _rope(config)
    if "long_factor" in rope:
        yield "rope_factors_long.weight", torch.tensor(rope["long_factor"])
        yield "rope_factors_short.weight", torch.tensor(rope["short_factor"])
    if rope.get("rope_type") == "llama3":
        half = config["head_dim"] // 2
        frequencies = rope["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
        low, high, factor = (
            rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        )  # fmt: skip
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        yield "rope_freqs.weight", (1 / ((1 - smooth) / factor + smooth)).float()


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the rotary embedding, also those of older configs."""
    older = {"rope_theta": config.get("rope_theta"), **config.get("rope_scaling", {})}
    found: dict[str, Any] = config.get("rope_parameters", older)
    return found


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = _rope(config)
    local, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if local is not None:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope and rope["rope_type"] != "llama3":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        size = config.get("moe_intermediate_size", config["intermediate_size"])
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if config["model_type"] != "mixtral":
            writer.add_expert_feed_forward_length(size)


def _add_tokenizer_of(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    given = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    by_id = {number: (token, 1) for token, number in given["model"]["vocab"].items()}
    for added in given["added_tokens"]:
        by_id[added["id"]] = (added["content"], 3 if added["special"] else 4)
    tokens = [by_id.get(number, (f"[PAD{number}]", 5)) for number in range(size)]
    texts = [text for text, _ in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(texts)
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_merges([" ".join(pair) for pair in given["model"]["merges"]])
    writer.add_bos_token_id(texts.index(config["bos_token"]))
    writer.add_eos_token_id(texts.index(config["eos_token"]))
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    fill = [f"[PAD{i}]" for i in range(len(VOCABULARY), size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*VOCABULARY, *fill])
    writer.add_token_types([3, 3, *[1] * (len(VOCABULARY) - 2), *[5] * len(fill)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}ab")
