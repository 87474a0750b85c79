"""An unusable checkpoint is refused with one clear sentence, before anything is computed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from model import CheckpointError, Transformer, checkpoint_files, load_config, loader
from model.ops.backend import choose_backend
from tests.checkpoints import FAMILIES, edit_config, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("qwen2"), tmp_path / "broken"))


def load(folder: Path) -> Transformer:
    backend = choose_backend(torch.device("cpu"), torch.float32)
    model = Transformer(load_config(folder).held(backend))
    loader.load(model, folder, backend)
    return model


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def fails(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    fails(folder, "model.layers.2.mlp.up_proj.weight", "missing")


def test_an_extra_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"model.layers.9.extra": torch.zeros(1)}))
    fails(folder, "model.layers.9.extra", "not part of a qwen2 model")


def test_layers_for_further_tokens_are_not_loaded(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(checkpoint("glm4_moe"), tmp_path / "mtp")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.4.eh_proj.weight"] = torch.ones(2, 2)  # the model has 4 layers
    save_file(tensors, path)
    load(folder)
    edit_config(folder, num_nextn_predict_layers=0, num_mtp_layers=None)
    fails(folder, "model.layers.4.eh_proj.weight", "not part of a glm4_moe model")


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"model.norm.weight": torch.zeros(63)}))
    fails(folder, "model.norm.weight", "[63]", "[64]")


def test_a_tensor_of_another_dtype_is_refused(folder: Path) -> None:
    change_tensors(
        folder, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)})
    )
    fails(folder, "model.norm.weight", "I8", "BF16")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_recognized(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    fails(folder, "model.safetensors", "damaged or truncated")


def test_a_corrupt_header_is_recognized(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[:8] = (1 << 62).to_bytes(8, "little")
    path.write_bytes(data)
    fails(folder, "model.safetensors", "damaged or truncated")


def test_missing_weights_name_the_expected_files_and_a_conversion(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    fails(folder, "model.safetensors nor model.safetensors.index.json")
    (folder / "pytorch_model.bin").touch()
    fails(folder, "Convert them once", f"from_pretrained('{folder}'")
    (folder / "model.gguf").touch()
    (folder / "config.json").unlink()
    fails(folder, "give the GGUF file itself")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", "qwen2", max_shard_size="200KB")


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    fails(sharded, shard.name, "missing")


def test_an_index_cannot_refer_to_files_outside_its_directory(sharded: Path) -> None:
    change_index(
        sharded, lambda i: i["weight_map"].update({"model.norm.weight": "../x.safetensors"})
    )
    fails(sharded, "'../x.safetensors' is not a file of this directory")


def test_an_index_with_a_tensor_that_its_file_lacks_is_refused(sharded: Path) -> None:
    change_index(
        sharded,
        lambda i: i["weight_map"].update({"more": next(iter(i["weight_map"].values()))}),
    )
    fails(sharded, "'more'", "missing")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"weight_map": 3}', "\udcff{"])
def test_a_broken_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    fails(sharded, "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "bert"},
            ["'bert' is not supported; supp", "gpt_oss", "qwen3_moe"],
        ),
        ({"model_type": "qwen3_next"}, ["'qwen3_next' is not supported; the nearest is qwen3"]),
        ({"logit_scale": 2.0}, ["'logit_scale' = 2.0 is not supported"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "silu"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, ["'dynamic'", "yarn"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["'short_factor' is missing"]),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
            ["'short_factor' must contain 8 numbers, not 1"],
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 7 + [0]}},
            ["'short_factor' must be a list of numbers above 0"],
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["'partial_rotary_factor' of 0.5"]),
        ({"rope_parameters": {"rope_type": ["x"], "rope_theta": 1e4}}, ["['x']", "yarn"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1, "factor": 2}}, ["above 1"]),
        ({"rope_parameters": {"rope_theta": 1e4, "mscale": 2.0}}, ["'mscale'"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["all layers"]),
        ({"quantization_config": {"quant_method": "quip"}}, ["quantization 'quip'", "mxfp4"]),
        ({"quantization_config": {"quant_method": "mxfp4"}}, ["'mxfp4'", "for experts only"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 4 is not a multiple"]),
        ({"hidden_size": "64"}, ["'hidden_size' must be an integer", "'64'"]),
        ({"hidden_size": None}, ["'hidden_size' is missing"]),
        ({"layer_types": ["full_attention"]}, ["'layer_types'", "4 layers"]),
        ({"layer_types": ["linear_attention"] * 4}, ["'linear_attention'"]),
        ({"dtype": "float8_e4m3fn"}, ["dtype 'float8_e4m3fn'"]),
        ({"eos_token_id": "2"}, ["'eos_token_id' must be token ids"]),
        ({"rms_norm_eps": 0}, ["'rms_norm_eps' must be a number above 0"]),
        ({"tie_word_embeddings": "yes"}, ["'tie_word_embeddings' must be true or false"]),
        ({"vocab_size": 2**40}, ["'vocab_size' must be an integer"]),
    ],
)
def test_a_config_that_is_not_understood_is_refused(
    folder: Path, changes: dict[str, Any], words: list[str]
) -> None:
    edit_config(folder, **changes)
    fails(folder, "config.json", *words)


def test_keys_that_cannot_matter_are_ignored(folder: Path) -> None:
    edit_config(folder, unsloth_version="2026.1", _attn_implementation="eager", sep_token_id=3)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"some_new_switch": False, "other": None}
    path.write_text(json.dumps(config))
    load(folder)


def test_stop_ids_are_the_union_of_both_configs(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_config(folder).stop_ids == {0, 7, 9}


def test_a_folder_that_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="contains no config"):
        load_config(tmp_path)


def test_a_stored_head_that_equals_the_tied_embedding_is_not_loaded(folder: Path) -> None:
    change_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    notices: list[str] = []
    assert load_config(folder, notices.append).tie_word_embeddings
    assert notices == []
    model = load(folder)
    assert isinstance(model.head.weight, torch.Tensor)
    assert model.embedding is not None
    assert model.head.weight.data_ptr() == model.embedding.data_ptr()


def change_last_value(tensors: dict[str, torch.Tensor]) -> None:
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    tensors["lm_head.weight"] = head


@pytest.mark.parametrize("shards", [1, 3])
def test_a_stored_head_that_differs_from_the_tied_embedding_is_used_as_in_transformers(
    folder: Path, shards: int
) -> None:
    change_tensors(folder, change_last_value)
    peer = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if shards > 1:
        peer.save_pretrained(folder, max_shard_size="50KB")
        (folder / "model.safetensors").unlink(missing_ok=True)
        edit_config(folder, tie_word_embeddings=True)
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    notices: list[str] = []
    assert not load_config(folder, notices.append).tie_word_embeddings
    assert len(notices) == 1
    assert "config.json: 'tie_word_embeddings' is true, but the stored lm_head" in notices[0]
    model = load(folder)
    assert model.embedding is not None
    assert torch.equal(model.head.weight, peer.lm_head.weight)
    assert torch.equal(model.embedding, peer.model.embed_tokens.weight)
    assert not torch.equal(model.embedding, peer.lm_head.weight)


def test_a_tied_checkpoint_may_store_only_its_head(folder: Path) -> None:
    original = load(folder)
    change_tensors(
        folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})
    )
    edit_config(folder, dtype=None, torch_dtype=None)
    assert load_config(folder).tie_word_embeddings
    assert load_config(folder).dtype == "float32"
    model = load(folder)
    assert model.embedding is not None
    assert original.embedding is not None
    assert torch.equal(model.embedding, original.embedding)
    assert torch.equal(model.head.weight, original.embedding)


@pytest.mark.parametrize("stated", [None, "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_dtype_that_the_config_leaves_open_is_that_of_the_weights(
    folder: Path, dtype: torch.dtype, stated: str | None
) -> None:
    change_tensors(folder, lambda t: t.update({name: v.to(dtype) for name, v in t.items()}))
    edit_config(folder, dtype=stated, torch_dtype=None)
    assert load_config(folder).dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("offsets", [[0, 2**62], [-9, 2**62], [0, 1e400], [0, 2**80], [0], "ab"])
def test_offsets_beyond_the_file_are_reported_by_the_loader(folder: Path, offsets: Any) -> None:
    places = {"dtype": "F32", "shape": [512, 64], "data_offsets": offsets}
    header = json.dumps({"model.embed_tokens.weight": places, "lm_head.weight": places}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(100)
    (folder / "model.safetensors").write_bytes(content)
    assert load_config(folder).tie_word_embeddings
    fails(folder, "damaged or truncated")


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"\x02" + bytes(7) + b"[]", b"\x08" * 9])
def test_a_damaged_file_is_reported_by_the_loader(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    edit_config(folder, dtype=None)
    assert load_config(folder).dtype == "bfloat16"
    fails(folder, "damaged or truncated")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_declared_parameter_is_filled(name: str, checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint(name))
    parameters = list(model.parameters())
    assert len(parameters) > 20
    for parameter in parameters:
        value = getattr(parameter.holder, parameter.attribute)
        tensor = torch.stack(value) if isinstance(value, list) else value  # a list of experts
        assert tuple(tensor.shape) == parameter.shape, parameter.attribute
        assert tensor.isfinite().all(), parameter.attribute
    assert model.head.weight is not None


def test_a_large_load_reopens_its_files_and_reads_the_same_weights(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(sharded)
    monkeypatch.setattr(checkpoint_files, "_REOPEN_BYTES", 1000)
    again = load(sharded)
    actual, wanted = again.layers[3].mlp.down.weight, expected.layers[3].mlp.down.weight  # type: ignore[union-attr]
    assert torch.equal(actual, wanted)
