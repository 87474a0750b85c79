"""LoRA adapters change the weights as PEFT's merge_and_unload does."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model import CheckpointError, Transformer, load_config, loader
from model.ops.backend import choose_backend
from model.sharding import Shard
from tests.adapters import random_lora, write_adapter, write_changed
from tests.gguf_files import write_gguf

CPU = torch.device("cpu")
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
Adapter = tuple[str, float]


def parameters(
    checkpoint: Path, *adapters: Adapter, rank: int = 0, ranks: int = 1
) -> list[torch.Tensor]:
    model = Transformer(load_config(checkpoint), Shard(rank, ranks))
    loader.check(model, checkpoint, adapters)
    loader.load(model, checkpoint, choose_backend(CPU, torch.float32), adapters)
    values = [getattr(p.holder, p.attribute) for p in model.parameters()]
    return [v if isinstance(v, torch.Tensor) else torch.stack(v) for v in values]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def product(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


def test_several_adapters_with_patterns_ranks_and_weights(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    source = checkpoint("llama-llama3-rope")
    first = random_lora(source, Q, 4) | random_lora(source, DOWN, 2)
    config = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.2\.mlp\.down_proj": 5}}
    write_adapter(tmp_path / "a", first, config)
    second = random_lora(source, Q, 8, seed=1)
    write_adapter(tmp_path / "b", second, {"r": 8, "lora_alpha": 3, "use_rslora": True})
    expected = write_changed(
        tmp_path / "merged",
        source,
        {
            f"{Q}.weight": product(first, Q) * 6 / 4 - product(second, Q) * 0.5 * 3 / math.sqrt(8),
            f"{DOWN}.weight": product(first, DOWN) * 5 / 2,
        },
    )
    adapters = ((str(tmp_path / "a"), 1.0), (str(tmp_path / "b"), -0.5))
    assert_equal(parameters(source, *adapters), parameters(expected))
    for rank in range(2):
        assert_equal(
            parameters(source, *adapters, rank=rank, ranks=2),
            parameters(expected, rank=rank, ranks=2),
        )


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("phi3-window", ["model.layers.0.self_attn.qkv_proj", "model.layers.3.mlp.gate_up_proj"]),
        ("qwen3_moe", ["model.layers.0.mlp.experts.3.up_proj", "model.layers.1.mlp.up_proj"]),
    ],
)
def test_fused_linears_and_experts(
    name: str, modules: list[str], tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    source = checkpoint(name)
    tensors = {k: v for module in modules for k, v in random_lora(source, module).items()}
    write_adapter(tmp_path / "a", tensors)
    changes = {f"{module}.weight": product(tensors, module) * 6 / 4 for module in modules}
    expected = write_changed(tmp_path / "merged", source, changes)
    for rank in range(2):
        assert_equal(
            parameters(source, (str(tmp_path / "a"), 1.0), rank=rank, ranks=2),
            parameters(expected, rank=rank, ranks=2),
        )


def test_embedding_and_a_whole_head(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    source, module = checkpoint("llama-llama3-rope"), "model.embed_tokens"
    vocabulary, hidden = load_file(source / "model.safetensors")[f"{module}.weight"].shape
    first, second, head = (
        torch.randn(*shape) * 0.1 for shape in ((4, vocabulary), (hidden, 4), (vocabulary, hidden))
    )
    tensors = {
        f"{module}.lora_embedding_A": first,
        f"{module}.lora_embedding_B": second,
        "lm_head.weight": head,
    }
    write_adapter(tmp_path / "a", tensors, {"modules_to_save": ["lm_head"]})
    old = load_file(source / "model.safetensors")["lm_head.weight"]
    changes = {f"{module}.weight": (second @ first).T * 6 / 4, "lm_head.weight": head - old}
    expected = write_changed(tmp_path / "merged", source, changes)
    adapter = (str(tmp_path / "a"), 1.0)
    assert_equal(parameters(source, adapter), parameters(expected))
    with pytest.raises(CheckpointError, match="its weight can only be 1, not 0"):
        parameters(source, (adapter[0], 0.5))
    with pytest.raises(CheckpointError, match="several adapters change 'lm_head"):
        parameters(source, adapter, adapter)


def test_a_gguf_file_takes_adapters_by_the_names_of_transformers(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    source = checkpoint("llama-llama3-rope")
    path = write_gguf(source, tmp_path / "model.gguf")
    write_adapter(tmp_path / "a", random_lora(source, Q))
    adapter = (str(tmp_path / "a"), 1.0)
    assert_equal(parameters(path, adapter), parameters(source, adapter))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "'use_dora' = True is not supported"),
        ({"bias": "all"}, "'bias' must be \"none\""),
        ({"lora_bias": True}, "'lora_bias' = True is not supported"),
        ({"fan_in_fan_out": True}, "'fan_in_fan_out' must be false"),
        ({"new_key": 3}, "'new_key' = 3 is not supported"),
        ({"target_parameters": ["x"]}, "'target_parameters'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({"r": 5}, f"the rank of '{Q}' is 4, but adapter_config.json states 5"),
        ({"rank_pattern": {"q_proj": "x"}}, "'rank_pattern' must have numbers"),
        ({"alpha_pattern": {"(": 1}}, "is not a regular expression"),
        ({"lora_alpha": -1}, "'lora_alpha' must be a number above 0"),
    ],
)
def test_what_is_not_understood_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    source = checkpoint("llama-llama3-rope")
    folder = write_adapter(tmp_path / "a", random_lora(source, Q), config)
    with pytest.raises(CheckpointError) as raised:
        parameters(source, (str(folder), 1.0))
    assert message in str(raised.value)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.lora_A.weight": torch.zeros(4, 64)}, f"of '{Q}' it contains A"),
        ({f"{Q}.lora_magnitude_vector": torch.zeros(4)}, "lora_magnitude_vector' is not supported"),
        ({"model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64),
          "model.layers.9.self_attn.q_proj.lora_B.weight": torch.zeros(128, 4)},
         "'model.layers.9.self_attn.q_proj.weight', which is not a weight of this model"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 63), f"{Q}.lora_B.weight": torch.zeros(128, 4)},
         "has shape [4, 63], but the model requires [rank, 64]"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 64), f"{Q}.lora_B.weight": torch.zeros(128, 5)},
         "has shape [128, 5], but the model requires [128, 4]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path,
    checkpoint: Callable[[str], Path],
) -> None:  # fmt: skip
    folder = write_adapter(tmp_path / "a", tensors)
    with pytest.raises(CheckpointError) as raised:
        parameters(checkpoint("llama-llama3-rope"), (str(folder), 1.0))
    assert message in str(raised.value)


def test_a_tied_embedding_is_not_changed(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    tensors = {
        "model.embed_tokens.lora_embedding_A": torch.zeros(4, 512),
        "model.embed_tokens.lora_embedding_B": torch.zeros(64, 4),
    }
    folder = write_adapter(tmp_path / "a", tensors)
    with pytest.raises(CheckpointError, match="both as embedding and as head"):
        parameters(checkpoint("qwen2"), (str(folder), 1.0))


def test_missing_and_damaged_files_are_named(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    source = checkpoint("llama-llama3-rope")
    with pytest.raises(CheckpointError, match="no such directory of an adapter"):
        parameters(source, (str(tmp_path / "a"), 1.0))
    folder = write_adapter(tmp_path / "a", random_lora(source, Q))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: damaged or truncated"):
        parameters(source, (str(folder), 1.0))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: not a regular file"):
        parameters(source, (str(folder), 1.0))
