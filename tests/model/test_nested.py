"""Checkpoints with vision towers: their text model is run, from older and newer files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import CheckpointError, load_config
from model.families import parse_config
from tests.checkpoints import Peer, write_checkpoint
from tests.model.test_parity import assert_close, logits_of, prompt


def rewrite(folder: Path, rename: Callable[[str], str]) -> list[str]:
    """Rename the tensors of a checkpoint; returns the new names."""
    path = folder / "model.safetensors"
    renamed = {rename(name): value for name, value in load_file(path).items()}
    save_file(renamed, path)
    return list(renamed)


def old_llava(name: str) -> str:
    """As the first files of Gemma 3 and Mistral 3 name their tensors."""
    name = name.replace("model.language_model.", "language_model.model.")
    name = "language_model." + name if name.startswith("lm_head") else name
    return name.replace("model.vision_tower", "vision_tower")


def old_qwen(name: str) -> str:
    """As the files of Qwen2-VL name their tensors."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def new(name: str) -> str:
    """As transformers names tensors in memory."""
    for old in ("language_model.model.", "model."):
        if name.startswith(old) and not name.startswith(("model.language_model.", "model.visual.")):
            return "model.language_model." + name.removeprefix(old)
    return name.replace("language_model.lm_head", "lm_head")


@pytest.mark.parametrize(
    ("name", "old"),
    [("gemma3", old_llava), ("mistral3", old_llava), ("qwen2_vl", old_qwen)],
)
def test_tensors_may_have_their_older_and_newer_names(
    name: str, old: Callable[[str], str], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, name)
    ids = prompt(60)
    expected = Peer(tmp_path).logits(ids)
    layer = "layers.0.input_layernorm.weight"
    stored = rewrite(tmp_path, new)
    assert f"model.language_model.{layer}" in stored
    assert_close(logits_of(tmp_path, ids), expected)
    stored = rewrite(tmp_path, old)
    assert f"model.language_model.{layer}" not in stored
    assert_close(logits_of(tmp_path, ids), expected)


def test_the_keys_of_the_text_model_may_be_beside_the_others(tmp_path: Path) -> None:
    """As in the first files of Qwen2-VL."""
    write_checkpoint(tmp_path, "qwen2_vl")
    ids = prompt(60)
    expected = logits_of(tmp_path, ids)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text["vision_token_id"] = 500
    path.write_text(json.dumps({**text, **config, "model_type": "qwen2_vl"}))
    assert torch.equal(logits_of(tmp_path, ids), expected)


def test_experts_of_qwen3_vl_may_be_stored_transposed(tmp_path: Path) -> None:
    """As in the published files."""
    write_checkpoint(tmp_path, "qwen3_vl_moe")
    ids = prompt(60)
    expected = logits_of(tmp_path, ids)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name, value in tensors.items():
        if ".experts." in name:
            tensors[name] = value.transpose(1, 2).contiguous()
    save_file(tensors, path)
    assert torch.equal(logits_of(tmp_path, ids), expected)


def test_a_tensor_that_belongs_to_no_part_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_vl")
    rewrite(tmp_path, lambda name: name.replace("model.visual.", "model.audio."))
    with pytest.raises(CheckpointError, match="is not part of a qwen3_vl model"):
        logits_of(tmp_path, prompt(5))


@pytest.mark.parametrize("text", [3, [], "qwen2"])
def test_a_text_config_that_is_no_object_is_refused(text: Any) -> None:
    with pytest.raises(CheckpointError, match="'text_config' must be an object"):
        parse_config({"model_type": "qwen2_vl", "text_config": text}, "config.json")


def test_the_sparse_config_of_gemma_3_27b_is_understood() -> None:
    config = parse_config(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 255_999,
            "eoi_token_index": 256_000,
            "eos_token_id": [1, 106],
            "image_token_index": 262_144,
            "initializer_range": 0.02,
            "mm_tokens_per_image": 256,
            "model_type": "gemma3",
            "text_config": {
                "head_dim": 128,
                "hidden_size": 5376,
                "intermediate_size": 21_504,
                "model_type": "gemma3_text",
                "num_attention_heads": 32,
                "num_hidden_layers": 62,
                "num_key_value_heads": 16,
                "query_pre_attn_scalar": 168,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
                "sliding_window_pattern": 6,
            },
            "torch_dtype": "bfloat16",
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        },
        "config.json",
    )
    assert config.stop_ids == {1, 106}
    assert config.attention_scale == 168**-0.5
    assert config.tie_word_embeddings
    assert [i for i, layer in enumerate(config.layers) if layer.window is None] == [
        *range(5, 62, 6)
    ]
    assert (config.rope.theta, config.rope.factor) == (1e6, 8)
    assert {layer.rope.theta for layer in config.layers if layer.rope is not None} == {1e4}


def test_a_nested_checkpoint_names_its_own_type(checkpoint: Callable[[str], Path]) -> None:
    assert load_config(checkpoint("gemma3")).model_type == "gemma3"
