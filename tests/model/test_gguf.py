"""Models in GGUF files compute what the checkpoints compute that they were made from."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from engine import Engine, EngineConfig
from model import CheckpointError, Transformer, load_config, loader
from model.cost.operations import operations
from model.cost.workload import Workload
from model.formats.integers import Integers
from model.formats.mxfp4 import MXFP4
from model.gguf.blocks import read_floats, read_integers, read_mxfp4
from model.gguf.header import read_gguf
from model.gguf.tensor_types import TENSOR_TYPES, TensorType
from model.ops.backend import Backend, choose_backend
from model.ops.cpu.bindings import library
from model.sharding import Shard
from tests.checkpoints import FAMILIES, edit_config, write_checkpoint, write_mxfp4_pair
from tests.gguf_files import write_gguf
from tests.model import test_parity
from tests.model.test_parity import assert_close, logits_of, prompt

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", TENSOR_TYPES)
def test_every_type_has_the_values_that_the_package_gguf_finds(number: int) -> None:
    kind, known = TENSOR_TYPES[number], Kind(number)
    assert kind == TensorType(known.name, *gguf.GGML_QUANT_SIZES[known])
    # Small bytes, so that no half-precision number in a block is infinite.
    generator = np.random.default_rng(number)
    data = generator.integers(0, 256, (5, 3 * kind.bytes if kind.values > 1 else 64), np.uint8)
    blocks = data.reshape(5, -1, kind.bytes)
    if kind.values > 1:
        for at in range(kind.bytes):  # the scales are somewhere in here
            blocks[..., at] &= 0x7B if _is_half(kind.name, at) else 0xFF
    expected = torch.from_numpy(gguf.quants.dequantize(data, known).astype(np.float32))
    raw = torch.from_numpy(blocks)
    if kind.values == 1:
        found = read_floats(kind.name, torch.from_numpy(data)).float()
    else:
        read = read_mxfp4 if kind.name == "MXFP4" else lambda b: read_integers(kind.name, b)
        found = read(raw).dense(torch.float32)
    assert expected[expected.isfinite()].numel() > 0
    assert torch.equal(found[expected.isfinite()], expected[expected.isfinite()])


def _is_half(name: str, at: int) -> bool:
    """Whether a byte of a block is the upper one of a half-precision number, or an exponent."""
    uppers = {
        "Q2_K": (81, 83), "Q3_K": (109,), "Q4_K": (1, 3), "Q5_K": (1, 3), "Q6_K": (209,),
        "Q4_1": (1, 3), "Q5_1": (1, 3), "MXFP4": (0,),
    }  # fmt: skip
    return at in uppers.get(name, (1,))


@pytest.fixture(scope="module")
def converted(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]
) -> Callable[[str], tuple[Path, Path]]:
    """A tiny checkpoint by its name, and the GGUF file with the same values."""
    folder = tmp_path_factory.mktemp("gguf")

    def convert(name: str) -> tuple[Path, Path]:
        source = checkpoint(name)
        if name == "gemma3_text":  # what llama.cpp derives from other values
            source = folder / "gemma3"
            if not source.exists():
                shutil.copytree(checkpoint(name), source)
                kinds = ["sliding_attention"] * 5 + ["full_attention"]
                edit_config(source, query_pre_attn_scalar=32, layer_types=kinds)
        path = folder / f"{name}.gguf"
        return source, path if path.exists() else write_gguf(source, path)

    return convert


@pytest.mark.parametrize(
    "name",
    ["llama-llama3-rope", "llama-biases-linear-rope", "mixtral", "qwen2", "qwen3", "phi3-longrope",
     "phi3-window", "phi3-partial-rotary-wide", "gemma3_text", "gpt_oss"],
)  # fmt: skip
def test_a_file_computes_what_its_checkpoint_computes(
    name: str, converted: Callable[[str], tuple[Path, Path]]
) -> None:
    source, path = converted(name)
    ids = prompt(200)
    assert_close(logits_of(path, ids), logits_of(source, ids))


def test_qwen3_moe_with_experts_in_every_layer(tmp_path: Path) -> None:
    import transformers as tf

    from tests import checkpoints

    config = checkpoints.FAMILIES["qwen3_moe"]()
    values = {**config.to_dict(), "mlp_only_layers": [], "decoder_sparse_step": 1}
    checkpoints.FAMILIES["qwen3_moe-sparse"] = lambda: tf.Qwen3MoeConfig(**values)
    try:
        source = write_checkpoint(tmp_path / "hf", "qwen3_moe-sparse")
    finally:
        del checkpoints.FAMILIES["qwen3_moe-sparse"]
    path, ids = write_gguf(source, tmp_path / "model.gguf"), prompt(50)
    assert_close(logits_of(path, ids), logits_of(source, ids))


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.F16, Kind.BF16])
def test_quantized_weights_have_the_values_of_the_dequantized_ones(
    kind: Kind, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    source = tmp_path / "hf"
    shutil.copytree(checkpoint("llama-llama3-rope"), source)
    tensors = {
        name: torch.from_numpy(_rounded(value.numpy(), kind)) if value.dim() > 1 else value
        for name, value in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    # Twice quantized is once quantized, up to a unit of the scale's rounding.
    path = write_gguf(
        checkpoint("llama-llama3-rope"), tmp_path / "model.gguf", lambda name, values: kind
    )
    ids = prompt(50)
    assert_close(logits_of(path, ids), logits_of(source, ids))


def _rounded(values: np.ndarray, kind: Kind) -> np.ndarray:
    data = gguf.quants.quantize(values, kind)
    found: np.ndarray = gguf.quants.dequantize(data, kind)
    return found.copy()


def test_mxfp4_experts_stay_packed_in_their_other_order(tmp_path: Path) -> None:
    write_mxfp4_pair(tmp_path / "packed", tmp_path / "dense")
    path = write_gguf(
        tmp_path / "dense",
        tmp_path / "model.gguf",
        lambda name, values: Kind.MXFP4 if "_exps.weight" in name else Kind.F32,
    )
    kinds = {tensor.type.name for tensor in read_gguf(path).tensors.values()}
    assert kinds == {"F32", "MXFP4"}
    ids = prompt(60)
    assert_close(logits_of(path, ids), logits_of(tmp_path / "packed", ids))
    experts = load_config(path).layers[0].formats.experts
    assert (experts.name, experts.kept) == ("MXFP4", MXFP4)


@pytest.mark.parametrize("name", ["llama-llama3-rope", "gpt_oss"])
def test_a_rank_reads_its_part(
    name: str, converted: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, _ = converted(name)
    kind = Kind.Q8_0 if name.startswith("llama") else Kind.F32
    path = write_gguf(source, tmp_path / "model.gguf", lambda *_: kind)
    backend = choose_backend(CPU, torch.float32)
    for rank in range(2):
        loaded = []
        for checkpoint in (path, source):
            model = Transformer(load_config(checkpoint), Shard(rank, 2))
            loader.load(model, checkpoint, backend)
            values = [getattr(p.holder, p.attribute) for p in model.parameters()]
            loaded.append([v if isinstance(v, torch.Tensor) else torch.stack(v) for v in values])
        for found, expected in zip(*loaded, strict=True):
            assert found.shape == expected.shape
            error = (found - expected).norm() / expected.norm().clamp(min=1e-9)
            assert error < 0.01  # of 8 bits


def test_a_model_in_several_files_is_found_from_any_of_them(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    source = checkpoint("qwen2")
    write_gguf(source, tmp_path / "m.gguf", split_tensors=20)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 2
    ids = prompt(20)
    for file in (files[0], files[-1]):
        assert_close(logits_of(file, ids), logits_of(source, ids))
    files[1].rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{files[1].name}: missing"):
        load_config(files[0])
    shutil.copy(files[0], files[1])
    with pytest.raises(CheckpointError, match="does not say that it is file 2"):
        load_config(files[0])
    shutil.copy(files[0], tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"not named NAME-00001-of-"):
        load_config(tmp_path / "renamed.gguf")


def test_a_file_without_its_name_is_known_by_its_content(
    tmp_path: Path, converted: Callable[[str], tuple[Path, Path]]
) -> None:
    _, path = converted("qwen2")
    shutil.copy(path, tmp_path / "sha256-0")
    assert load_config(tmp_path / "sha256-0") == load_config(path)


def test_stop_tokens_are_also_known_by_their_texts(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        kv = writer.kv_data[0]
        tokens = kv["tokenizer.ggml.tokens"].value
        tokens[300], tokens[301], tokens[302] = "<|im_end|>", "<|endoftext|>", "<|end|>"
        kv["tokenizer.ggml.token_type"].value[300:302] = [3, 3]  # but not the third
        writer.add_eot_token_id(5)

    path = write_gguf(checkpoint("qwen2"), tmp_path / "m.gguf", change=add)
    assert load_config(path).stop_ids == {0, 5, 300, 301}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_float32("qwen2.attention.scale", 0.5), "'qwen2.attention.scale' = 0.5"),
        (lambda w: w.add_causal_attention(False), "'qwen2.attention.causal' = False"),
        (lambda w: w.kv_data[0].pop("qwen2.block_count"), "no 'qwen2.block_count'"),
        (lambda w: w.add_string("general.architecture", "mamba"), "'mamba' is not supported"),
        (lambda w: w.add_uint32("tokenizer.ggml.tokens", 7), "ggml.tokens' must be a list"),
        (lambda w: w.add_bool("tokenizer.ggml.token_type", True), "token_type' must be a list"),
        (lambda w: w.add_string("qwen2.rope.freq_base", "x" * 9999), "above 0, not 'x{900,1000}…"),
        (lambda w: w.add_value_length(7), "'qwen2.attention.value_length' must be"),
        (lambda w: w.add_block_count(9), "'blk.4.attn_norm.weight' of shape"),
        (lambda w: w.add_embedding_length(32), "its metadata requires"),
    ],
)  # fmt: skip
def test_what_the_metadata_say_and_is_not_understood_is_refused(
    change: Callable[[gguf.GGUFWriter], None], message: str, tmp_path: Path,
    checkpoint: Callable[[str], Path],
) -> None:  # fmt: skip
    def allow_again(writer: gguf.GGUFWriter) -> None:
        add, kv = writer.add_key_value, writer.kv_data[0]

        def replace(key: str, *args: object, **options: object) -> None:
            kv.pop(key, None)
            add(key, *args, **options)  # type: ignore[arg-type]

        writer.add_key_value = replace  # type: ignore[method-assign]
        change(writer)

    path = write_gguf(checkpoint("qwen2"), tmp_path / "m.gguf", change=allow_again)
    with pytest.raises(CheckpointError, match=message):
        loader.check(Transformer(load_config(path)), path)


def header(*, version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(kind: int, shape: list[int], start: int = 0, name: str = "t") -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, start)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated within its header"),
        (b"PK\3\4", "is not a GGUF file"),
        (header(version=1), "has version 1 of the format"),
        (header(version=3 << 24), "is big-endian"),
        (header(tensors=1 << 60), "its header has"),
        (header(keys=1 << 60), "its header has"),
        (header(keys=2), "truncated within its header"),
        (header(keys=1, rest=struct.pack("<Q", 1 << 62)), "truncated within its header"),
        (header(keys=1, rest=text("k") + struct.pack("<I", 99)), "a value of unknown type 99"),
        (header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 9, 1)), "an array of type 9"),
        (header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 0, 1 << 40)), "truncated within"),
        (header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 8, 1 << 40)), "more than"),
        (header(keys=2, rest=(text("k") + struct.pack("<IB", 0, 1)) * 2), "'k' is there twice"),
        (header(keys=1, rest=text("general.alignment") + struct.pack("<II", 4, 3)), "a multiple"),
        (header(tensors=1, rest=tensor(16, [256])), "IQ2_XXS, which is not supported; supported"),
        (header(tensors=1, rest=tensor(999, [256])), "has type number 999"),
        (header(tensors=1, rest=tensor(0, [])), "has 0 dimensions"),
        (header(tensors=1, rest=tensor(0, [0])), "of shape"),
        (header(tensors=1, rest=tensor(0, [1 << 40, 1 << 40])), "of shape"),
        (header(tensors=1, rest=tensor(8, [33])), "does not consist of whole blocks of Q8_0"),
        (header(tensors=1, rest=tensor(0, [8], 1)), "starts at 1"),
        (header(tensors=1, rest=tensor(0, [8], 1 << 40)), "is truncated: tensor 't'"),
        (header(tensors=2, rest=tensor(0, [8]) * 2), "'t' is there twice"),
        (
            header(tensors=2, rest=tensor(0, [16]) + tensor(0, [8], 32, "u") + bytes(128)),
            "tensors 't' and 'u' overlap",
        ),
        (header(keys=1, rest=text("split.count") + struct.pack("<Id", 12, 2.5)), "'split.count'"),
    ],
)  # fmt: skip
def test_damaged_headers_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_config(path)


def test_a_file_cut_anywhere_is_refused(
    tmp_path: Path, converted: Callable[[str], tuple[Path, Path]]
) -> None:
    _, path = converted("qwen2")
    data = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(0, len(data), len(data) // 100):
        cut.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            load_config(cut)


def test_a_folder_with_a_gguf_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"give the GGUF file itself: .*model\.gguf"):
        load_config(tmp_path)


def _mixed(name: str, values: np.ndarray) -> Kind:
    return Kind.Q8_0 if "attn_v" in name or "down" in name else Kind.Q4_0


@pytest.mark.parametrize("name", ["llama-llama3-rope", "mixtral"])
def test_tensors_of_several_types_become_int8_where_they_have_one_format(
    name: str, tmp_path: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files with Q4_K_M, some values and some of the experts' last linears have 6 bits."""
    path, ids = write_gguf(checkpoint(name), tmp_path / "mixed.gguf", _mixed), prompt(30)
    config = load_config(path)
    formats = config.layers[0].formats
    assert [form.kept.name for form in (formats.qkv, formats.out)] == ["int8", "int4"]
    ops = {op.name: op for op in operations(config, Workload("decode", 1, 1, 9, "bfloat16"))}
    kinds = [ops[op].products[0].kind for op in ("qkv_proj", "o_proj")]
    assert kinds == ["int8", "int4"]  # by which measured rates are found
    assert formats.experts.kept.name == ("int8" if name == "mixtral" else "dense")
    exact = logits_of(path, ids)  # dense
    limit = 0.2 if name == "mixtral" else 0.06  # rounding can change a token's experts
    assert _error(logits_of(path, ids, dtype=torch.bfloat16), exact) < limit
    monkeypatch.setattr(test_parity, "choose_backend", lambda *_: Backend(CPU, torch.float32))
    assert_close(logits_of(path, ids), exact)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _random_blocks(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Blocks of a type that the package gguf only reads."""
    count, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(len(values))
    data = random.integers(0, 256, (values.size // count, size), np.uint8)
    scales = (random.uniform(0.3, 1, len(data)) * 1e-3).astype(np.float16)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind.name, ()):
        data[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return data.reshape(*values.shape[:-1], -1)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q6_K])
def test_types_with_a_scale_for_16_values_are_rounded_to_int8(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
    }
    llama = FAMILIES["llama-llama3-rope"]().to_dict() | sizes
    monkeypatch.setitem(FAMILIES, "wide", lambda: transformers.LlamaConfig(**llama))
    quantize = gguf.quants.quantize
    monkeypatch.setattr(
        gguf.quants,
        "quantize",
        lambda v, k: _random_blocks(v, k) if k == kind else quantize(v, k),
    )
    path = write_gguf(
        write_checkpoint(tmp_path / "hf", "wide"), tmp_path / "model.gguf",
        lambda name, values: kind if name.startswith("blk.") else Kind.F32,
    )  # fmt: skip
    ids, form = prompt(30), Integers(8, 32, rows="16", quantizes=False)
    assert load_config(path).layers[0].formats.qkv.kept == form
    exact = logits_of(path, ids)  # dense
    assert _error(logits_of(path, ids, dtype=torch.bfloat16), exact) < 0.03
    found: list[str] = []
    Engine(path, EngineConfig(device="cpu", dtype="bfloat16"), notice=found.append)
    if library() is not None:
        (notice,) = found
        assert f"weights in {kind.name} are rounded to int8 with a scale for 32 values" in notice
    monkeypatch.setattr(test_parity, "choose_backend", lambda *_: Backend(CPU, torch.float32))
    assert 0 < _error(logits_of(path, ids), exact) < 0.02
