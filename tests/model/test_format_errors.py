"""Quantized checkpoints that are damaged or not understood are refused by name."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model import CheckpointError, Transformer, load_config, loader
from model.families import parse_config
from model.ops.backend import Backend
from tests.model.quantized import change_tensors, compute_alike, of_case, refusal
from tests.quantized_cases import CASES, FP8, GPTQ, W4, compressed_tensors, grouped
from tests.quantized_checkpoints import Write, gptq, is_linear, write_quantized

CPU = torch.device("cpu")
MODULE = "model.layers.1.mlp.down_proj."


@pytest.mark.parametrize(
    ("name", "tensor", "value", "words"),
    [
        ("fp8 channel", "weight_scale_inv", None, ["weight_scale_inv", "missing"]),
        ("fp8 blocks", "weight_scale_inv", torch.ones(2, 2), ["[2, 2]", "[1, 1]"]),
        ("fp8 channel", "weight", torch.ones(64, 96).to(torch.float8_e5m2), ["F8_E5M2", "F8_E4M3"]),
        ("fp8 channel", "weight_scale_inv", torch.ones(64).int(), ["I32", "F32"]),
        ("w4 group", "weight_packed", torch.zeros(64, 24).int(), ["[64, 24]", "[64, 12]"]),
        ("w4 group", "weight_scale", torch.ones(64, 2), ["[64, 2]", "[64, 3]"]),
        ("w4 asymmetric", "weight_zero_point", None, ["weight_zero_point", "missing"]),
        ("w4 group order", "weight_g_idx", torch.full((96,), 3).int(), ["not one of the 3 groups"]),
        ("gptq", "qzeros", torch.zeros(3, 4).int(), ["[3, 4]", "[3, 8]"]),
        ("gptq", "scales", None, ["scales", "missing"]),
        ("gptq", "g_idx", torch.arange(96).int() % 3, ["'desc_act' is false: set it to true"]),
        ("gptq order", "g_idx", torch.full((96,), -1).int(), ["not one of the 3 groups"]),
        ("awq", "qweight", torch.zeros(96, 8), ["F32", "I32"]),
        ("nvfp4", "weight_global_scale", None, ["weight_global_scale", "missing"]),
        ("mxfp4", "weight_scale", torch.zeros(64, 6, dtype=torch.uint8), ["[64, 6]", "[64, 3]"]),
    ],
)
def test_damaged_tensors_are_refused_by_name(
    name: str, tensor: str, value: torch.Tensor | None, words: list[str], write: Write
) -> None:
    quantized, _ = of_case(write, name)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(MODULE + tensor)
        if value is not None:
            tensors[MODULE + tensor] = value

    change_tensors(quantized, change)
    message = refusal(quantized)
    for word in (MODULE, *words):
        assert word in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes"}, ["'bitsandbytes' is not supported", "awq", "gptq"]),
        ({"load_in_4bit": True}, ["'bitsandbytes' is not supported", "checkpoint in 16 bits"]),
        ({**GPTQ, "data_type": "mx_fp"}, ["'data_type' = mx_fp is not supported"]),
        ({"quant_method": "awq", "checkpoint_format": "gemv"}, ["'gemv' is not supported"]),
        ({"quant_method": "awq", "desc_act": True}, ["'desc_act' = True is not supported"]),
        ({**FP8, "activation_scheme": "token"}, ["'activation_scheme' = token", "dynamic, static"]),
        ({**FP8, "fmt": "e5m2"}, ["'fmt' = e5m2"]),
        ({**FP8, "weight_block_size": [128]}, ["'weight_block_size' must be two integers"]),
        ({**FP8, "weight_block_size": [0, 1]}, ["'weight_block_size' must be two integers"]),
        ({**FP8, "rotation": True}, ["'rotation' = True is not supported"]),
        ({**FP8, "kv_cache_scheme": {"num_bits": 8}}, ["'kv_cache_scheme'", "set it to null"]),
        ({**FP8, "modules_to_not_convert": "lm_head"}, ["must be a list of names"]),
        ({**FP8, "modules_to_not_convert": ["(a+)+b"]}, ["may take long: simplify it"]),
        ({**GPTQ, "bits": 3}, ["'bits' = 3 is not supported; supported: 4, 8"]),
        ({**GPTQ, "checkpoint_format": "marlin"}, ["'checkpoint_format' = marlin", "gptq_v2"]),
        ({**GPTQ, "group_size": 0}, ["'group_size' must be an integer"]),
        ({**GPTQ, "dynamic": {"+:x": {"bits": 2}}}, ["'bits' = 2"]),
        ({**GPTQ, "dynamic": {"-:(": {}}}, ["is not a regular expression"]),
        ({**GPTQ, "modules_in_block_to_quantize": [[1]]}, ["lists of names"]),
        ({"quant_method": "awq", "version": "gemv"}, ["'gemv' is not supported", "gemm"]),
        ({"quant_method": "awq", "zero_point": False}, ["'zero_point' = False"]),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, ["'quant_algo' = W4A8_AWQ"]),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, ["null"]),
        ({**W4, "kv_cache_scheme": {}, "config_groups": {}}, ["'config_groups' must be an object"]),
        ({**W4, "transform_config": {"a": 1}}, ["'transform_config'"]),
        ({**W4, "sparsity_config": {"format": "sparse-24-bitmask"}}, ["'sparsity_config'"]),
        ({**W4, "format": "marlin-24"}, ["format 'marlin-24' with 4 bits", "pack-quantized"]),
        ({**W4, "ignore": ["re:*"]}, ["is not a regular expression"]),
        (compressed_tensors("pack-quantized", grouped(3)), ["with 3 bits", "4 and 8 bits"]),
        (compressed_tensors("pack-quantized", grouped(4, dynamic=True)), ["'dynamic' = True"]),
        (compressed_tensors("pack-quantized", grouped(4, actorder="x")), ["'actorder' = x"]),
        (compressed_tensors("pack-quantized", grouped(4, strategy="row")), ["strategy 'row'"]),
        (compressed_tensors("pack-quantized", grouped(4, zip=1)), ["'zip' = 1"]),
    ],
)
def test_settings_that_are_not_understood_are_refused_by_name(
    settings: dict[str, Any], words: list[str], tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    write_quantized(checkpoint("qwen2"), tmp_path, tmp_path, settings, lambda module: None)
    message = refusal(tmp_path)
    for word in (str(tmp_path), *words):
        assert word in message


def test_a_group_size_that_does_not_divide_the_inputs_is_refused(write: Write) -> None:
    quantized, _ = write(
        "qwen2", {**GPTQ, "group_size": 48}, lambda name: gptq(4, 32) if is_linear(name) else None
    )
    assert "q_proj.weight: 64 rows or columns are not a multiple of 48" in refusal(quantized)


def test_kv_scales_are_not_read_once_the_scheme_is_removed(write: Write) -> None:
    quantized, dense = of_case(write, "compressed fp8")
    change_tensors(
        quantized, lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(1)})
    )
    compute_alike(quantized, dense)


def test_a_dense_weight_among_packed_ones_names_the_remedy(write: Write) -> None:
    settings, encoder = CASES["mxfp4"]
    quantized, _ = write(
        "qwen2",
        settings,
        lambda name: encoder if is_linear(name) and "k_proj" not in name else None,
    )
    backend = Backend(CPU, torch.float32)  # keeps MXFP4
    with pytest.raises(CheckpointError, match=r"k_proj.weight: stored dense, .*an exception"):
        loader.load(Transformer(load_config(quantized).held(backend)), quantized, backend)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.|.)" * 30, ".*.*.*.*.*.*x", "a?" * 40 + "b", "x" * 2000, "(a|b*)*"]
)
def test_a_pattern_that_could_take_long_is_refused_at_once(pattern: str) -> None:
    config = _config({**W4, "ignore": [f"re:{pattern}"]})
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match="may take long: simplify it"):
        parse_config(config, "config.json")
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize(
    "pattern",
    [
        r"re:.*self_attn.(q|k|v|o)_proj$",
        r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj",
        r"re:.*layers\.(0|1|2|3|4|5|6|7|8|9|10|11)\..*mlp.*",
        r"re:^(?!.*experts).*$",
        r"re:[^x]+(?:_proj)?",
    ],
)
def test_usual_patterns_are_accepted(pattern: str) -> None:
    assert parse_config(_config({**W4, "ignore": [pattern]}), "config.json").layers


@pytest.mark.parametrize(
    "settings",
    [
        {  # AutoRound's export to GPTQ
            **{"autoround_version": "0.4.5", "bits": 4, "damp_percent": 0.01, "data_type": "int"},
            **{"desc_act": False, "enable_quanted_input": True, "group_size": 128, "iters": 200},
            **{"low_gpu_mem_usage": True, "lr": 0.005, "minmax_lr": 0.005, "nsamples": 128},
            **{"provider": "auto-round", "quant_method": "gptq", "scale_dtype": "torch.float16"},
            **{"seqlen": 2048, "sym": True, "true_sequential": False},
        },
        {  # GPTQModel's
            **{"bits": 4, "checkpoint_format": "gptq", "desc_act": False, "format": "gptq"},
            **{"group_size": 128, "hyb_act": False, "lm_head": False, "meta": {"mse": 0.0}},
            **{"method": "gptq", "pack_dtype": "int32", "quant_method": "gptq", "sym": True},
        },
        {  # GPTQModel's AWQ
            **{"bits": 4, "checkpoint_format": "gemm", "desc_act": False, "format": "gemm"},
            **{"group_size": 128, "lm_head": False, "meta": {}, "pack_dtype": "int32"},
            **{"quant_method": "awq", "sym": True, "zero_point": True},
        },
    ],
)
def test_settings_of_other_programs_are_read(settings: dict[str, Any]) -> None:
    assert len(parse_config(_config(settings), "config.json").stored_formats.formats) == 1


def _config(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "quantization_config": settings,
    }
