"""LoRA adapters change the weights as PEFT's merge_and_unload does."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model import CheckpointError, Transformer, load_config, loader
from model.formats import DENSE
from model.ops.backend import Backend, choose_backend
from model.sharding import Shard
from tests.adapters import expert_lora, random_lora, write_adapter, write_changed
from tests.gguf_files import write_gguf
from tests.quantized_cases import CASES
from tests.quantized_checkpoints import Write, is_linear

CPU = torch.device("cpu")
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
Adapter = tuple[str, float]
Tensors = dict[str, torch.Tensor]


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


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_parameters_of_all_experts(
    name: str, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    source, layer = checkpoint(name), 2
    tensors, products = expert_lora(source, layer)
    config = {"target_parameters": ["x"], "alpha_pattern": {"experts.down_proj": 10}}
    adapter = (str(write_adapter(tmp_path / "a", tensors, config)), 1.0)
    up, down = products["gate_up_proj"] * 6 / 4, products["down_proj"] * 10 / 4
    prefix, size = f"model.layers.{layer}.mlp.experts", up.shape[1] // 2
    changes = {f"{prefix}.gate_up_proj": up.mT, f"{prefix}.down_proj": down.mT}
    if name != "gpt_oss":
        own = {"gate_proj": up[:, :size], "up_proj": up[:, size:], "down_proj": down}
        if name == "mixtral":
            prefix = f"model.layers.{layer}.block_sparse_moe.experts"
            own = dict(zip(("w1", "w3", "w2"), own.values(), strict=True))
        changes = {
            f"{prefix}.{expert}.{stem}.weight": values[expert]
            for stem, values in own.items()
            for expert in range(len(up))
        }
    expected = write_changed(tmp_path / "merged", source, changes)
    for rank in range(2):
        assert_equal(
            parameters(source, adapter, rank=rank, ranks=2),
            parameters(expected, rank=rank, ranks=2),
        )
    if name != "qwen3_moe":  # of which GGUF files have experts in every layer
        path = write_gguf(source, tmp_path / "model.gguf")
        assert_equal(parameters(path, adapter), parameters(source, adapter))
    wrong = {key: value for key, value in tensors.items() if "base_layer" not in key}
    for shape in ((4 * len(up), 40), ()):
        wrong[f"model.layers.{layer}.mlp.experts.lora_A.weight"] = torch.zeros(shape)
        folder = write_adapter(tmp_path / "b", wrong, config)
        with pytest.raises(CheckpointError) as caught:
            parameters(source, (str(folder), 1.0))
        assert f"tensors of shapes {[*shape]} and" in str(caught.value)


@pytest.mark.parametrize("name", ["w4 group", "mxfp4", "fp8 channel"])
def test_quantized_weights_that_change_become_dense(
    name: str, tmp_path: Path, write: Write
) -> None:
    settings, encoder = CASES[name]
    quantized, dense = write("qwen2", settings, lambda m: encoder if is_linear(m) else None)
    tensors = random_lora(dense, Q) | random_lora(dense, DOWN)
    adapter = (str(write_adapter(tmp_path / "a", tensors)), 1.0)
    merged = write_changed(
        tmp_path / "merged",
        dense,
        {f"{module}.weight": product(tensors, module) * 6 / 4 for module in (Q, DOWN)},
    )
    backend = Backend(CPU, torch.float32)  # keeps all formats
    config = load_config(quantized)
    changed = loader.with_adapters(config, quantized, [adapter])
    assert [layer.formats.qkv == DENSE for layer in changed.layers[:3]] == [False, True, False]
    assert [layer.formats.down == DENSE for layer in changed.layers[:3]] == [False, False, True]
    for own in (config, changed):  # ranks besides the first one have the checkpoint's
        model = Transformer(own.held(backend))
        loader.load(model, quantized, backend, [adapter])
        wanted = Transformer(load_config(merged))
        loader.load(wanted, merged, backend)
        for found, plain in zip(model.parameters(), wanted.parameters(), strict=True):
            values, expected = (getattr(each.holder, each.attribute) for each in (found, plain))
            if not isinstance(values, torch.Tensor):
                values = values.dense(torch.float32)
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


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
        ({"use_dora": True}, "PEFT's merge_and_unload merges into the model"),
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
         "'model.layers.9.self_attn.q_proj.weight', which is not a linear or embedding"),
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
    with pytest.raises(CheckpointError, match=r"adapter .*/a does not exist"):
        parameters(source, (str(tmp_path / "a"), 1.0))
    with pytest.raises(CheckpointError, match=r"not an adapter .* no adapter_config\.json"):
        parameters(source, (str(tmp_path), 1.0))
    folder = write_adapter(tmp_path / "a", random_lora(source, Q))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: damaged or truncated"):
        parameters(source, (str(folder), 1.0))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: not a regular file"):
        parameters(source, (str(folder), 1.0))
    (folder / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, which .* save_pretrained"):
        parameters(source, (str(folder), 1.0))
