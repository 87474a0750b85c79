"""Quantized checkpoints: they compute what the dense checkpoint with the same values computes.

The packing in tests/quantized_checkpoints.py was compared with the package compressed-tensors
0.20.1, with transformers' FP8 code, and with the sources of AutoGPTQ and AutoAWQ.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from model import CheckpointError, Transformer, load_config, loader
from model.config import QUANTIZED
from model.formats import DENSE, MXFP4
from model.formats.integers import Integers
from model.ops.backend import Backend, choose_backend
from model.ops.mxfp4 import Mxfp4
from model.sharding import Shard
from tests.model.quantized import compute_alike, of_case, refusal
from tests.model.test_parity import logits_of, prompt
from tests.quantized_cases import CASES, CHANNEL, FLOAT8, FP8, GPTQ, WITH_EXPERTS, grouped
from tests.quantized_checkpoints import Encoder, Write, compressed, fp8, is_linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_dequantized_checkpoint(name: str, write: Write) -> None:
    compute_alike(*of_case(write, name))


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_logits_with_experts_are_those_of_the_dequantized_checkpoint(
    name: str, write: Write
) -> None:
    compute_alike(*of_case(write, name, "qwen3_moe"))


KEPT = ["w4 asymmetric", "w8 channel", "w8a8 int", "gptq", "gptq 8 bits", "awq", "awq channel"]


@pytest.mark.parametrize("name", KEPT)
def test_integers_keep_their_bits_where_there_are_kernels(name: str, write: Write) -> None:
    """Rows have 16 bits then: results are as exact as those of dense weights in bfloat16."""
    backend = choose_backend(CPU, torch.bfloat16)
    if not backend.keeps_integers(quantizes=False):
        pytest.skip("no kernel reads integers here")
    quantized, dense = of_case(write, name)
    ids = prompt(20)
    exact = logits_of(dense, ids)
    held = load_config(quantized).held(backend)
    assert {type(layer.formats.down) for layer in held.layers} == {Integers}
    errors = [
        (logits_of(folder, ids, dtype=torch.bfloat16) - exact).norm()
        for folder in (quantized, dense)
    ]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize(
    ("name", "family", "form", "dtype"),
    [
        ("gptq order", "qwen2", "fp8", torch.float32),
        ("w4 group", "qwen3_moe", "fp8", torch.float32),
        ("mxfp4", "qwen3_moe", "fp8", torch.float32),
        ("fp8 channel", "qwen2", "int8", torch.bfloat16),
        ("fp8 small blocks", "qwen3_moe", "int4", torch.bfloat16),
    ],
)
def test_weights_without_a_kernel_can_be_quantized_as_they_are_loaded(
    name: str, family: str, form: str, dtype: torch.dtype, write: Write
) -> None:
    backend = choose_backend(CPU, dtype)
    if QUANTIZED[form].held(backend, stacked=False) == DENSE:
        pytest.skip("no kernel reads integers here")
    pair, ids = of_case(write, name, family), prompt(20)
    quantized, dense = (
        logits_of(folder, ids, lambda config: config.quantized(form), dtype) for folder in pair
    )
    assert (quantized - dense).norm() < 1e-5 * dense.norm()
    held = load_config(pair[0]).quantized(form).held(backend)
    assert {layer.formats.qkv for layer in held.layers} == {QUANTIZED[form]}
    assert held.held(backend) == held


@pytest.mark.parametrize("name", ["fp8 small blocks", "fp8 channel", "w4 group order"])
def test_fused_tensors_are_divided_into_their_parts(name: str, write: Write) -> None:
    compute_alike(*of_case(write, name, "phi3-window"))


@pytest.mark.parametrize("name", ["fp8 small blocks", "w4 group"])
def test_projections_to_latents_and_heads_are_dequantized(name: str, write: Write) -> None:
    compute_alike(*of_case(write, name, "deepseek_v3-wide"))


def parameters(folder: Path, shard: Shard) -> list[torch.Tensor]:
    """All parameters of a rank, in float32 without a layout of its own."""
    backend = choose_backend(CPU, torch.float32)
    model = Transformer(load_config(folder).held(backend), shard)
    loader.load(model, folder, backend)
    found = [getattr(each.holder, each.attribute) for each in model.parameters()]
    return [torch.stack(value) if isinstance(value, list) else value for value in found]


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize("name", CASES)
def test_a_rank_reads_its_part_of_every_weight(name: str, family: str, write: Write) -> None:
    if family == "qwen3_moe" and name not in WITH_EXPERTS:
        return
    settings, encoder = CASES[name]
    has_groups = "group_size" in json.dumps(settings)

    def encode(module: str) -> Encoder | None:
        # The 96 inputs of a dense MLP are three groups of 32, which cannot be divided in two.
        is_divided = not (has_groups and module.endswith("mlp.down_proj"))
        return encoder if is_linear(module) and is_divided else None

    pair = write(family, settings, encode)
    for rank in range(2):
        quantized, dense = (parameters(folder, Shard(rank, 2)) for folder in pair)
        for ours, wanted in zip(quantized, dense, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_a_part_that_divides_a_group_is_refused(write: Write) -> None:
    quantized, _ = of_case(write, "w4 group")
    config = load_config(quantized)
    with pytest.raises(CheckpointError, match=r"down_proj.weight: .*divide a group of 32.*fewer"):
        loader.check(Transformer(config, Shard(0, 2)), quantized)
    loader.check(Transformer(config), quantized)


def test_modelopt_may_state_the_quantization_in_a_file_of_its_own(write: Write) -> None:
    quantized, dense = of_case(write, "modelopt nvfp4")
    config = json.loads((quantized / "config.json").read_text())
    settings = config.pop("quantization_config")
    (quantized / "config.json").write_text(json.dumps(config))
    own = {
        "quant_algo": settings["quant_algo"],
        "group_size": 16,
        "kv_cache_quant_algo": None,
        "exclude_modules": settings["ignore"],
    }
    (quantized / "hf_quant_config.json").write_text(json.dumps({"quantization": own}))
    compute_alike(quantized, dense)
    (quantized / "hf_quant_config.json").write_text(json.dumps({"quantization": 4}))
    assert "hf_quant_config.json: 'quantization' must be an object" in refusal(quantized)


def test_several_groups_exceptions_and_a_quantized_embedding_and_head(write: Write) -> None:
    # The name of a module counts before patterns, and patterns before classes.
    settings = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "ignore": ["re:.*layers.2.mlp.*"],
        "config_groups": {
            "classes": {
                "targets": ["Linear"],
                "weights": CHANNEL,
                "format": "int-quantized",
                "input_activations": {"num_bits": 8, "type": "int", "dynamic": True},
            },
            "patterns": {
                "targets": ["re:.*mlp.(gate|up)_proj", "Embedding"],
                "weights": grouped(4),
                "format": "pack-quantized",
            },
            "names": {
                "targets": ["model.layers.1.mlp.gate_proj"],
                "weights": {**FLOAT8, "strategy": "channel"},
                "format": "float-quantized",
            },
        },
    }

    def encoder(module: str) -> Encoder | None:
        if "layers.2.mlp" in module:
            return None
        if module == "model.layers.1.mlp.gate_proj":
            return fp8(lambda outputs: (outputs, 1), "weight_scale")
        if module.endswith(("gate_proj", "up_proj", "embed_tokens")):
            return compressed(4, 32, True)
        return compressed(8, None, True, packed=False)

    quantized, dense = write("llama-llama3-rope", settings, encoder)
    compute_alike(quantized, dense)
    config = load_config(quantized)
    assert config.stored_formats.activations == "int8"
    formats = [layer.formats for layer in config.layers]
    assert formats[0].gate_up.name == "int4"
    assert formats[1].gate_up == formats[2].down == DENSE
    assert formats[0].qkv == formats[1].down != DENSE


RULES: dict[str, tuple[dict[str, Any], str]] = {
    "fp8": (
        {
            **FP8,
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp", "model.layers.3.self_attn"],
        },
        r".*(layers\.0\.mlp|layers\.3\.self_attn)",
    ),
    "awq": (
        {**CASES["awq"][0], "modules_to_not_convert": ["down_proj", "layers.2."]},
        r".*(down_proj|layers\.2\.)",
    ),
    "gptq modules": (
        {
            **GPTQ,
            "modules_in_block_to_quantize": [
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["mlp.down_proj"],
            ],
        },
        ".*(gate_proj|up_proj|o_proj)",
    ),
    "gptq dynamic": (
        {**GPTQ, "dynamic": {r"-:.*\.down_proj": {}, r"+:.*\.2\.": {"bits": 4}}},
        ".*down_proj",
    ),
    "modelopt": (
        {**CASES["modelopt nvfp4"][0], "ignore": ["model.layers.1*"]},
        r"model\.layers\.1",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_exceptions_are_read_as_the_packages_read_them(name: str, write: Write) -> None:
    settings, exceptions = RULES[name]
    kind = {"gptq modules": "gptq", "gptq dynamic": "gptq", "modelopt": "modelopt nvfp4"}
    _, encoder = CASES[kind.get(name, "fp8 channel" if name == "fp8" else name)]
    is_exception = re.compile(exceptions).match

    def encode(module: str) -> Encoder | None:
        return encoder if is_linear(module) and not is_exception(module) else None

    quantized, dense = write("qwen2", settings, encode)
    compute_alike(quantized, dense)
    rules = load_config(quantized).stored_formats
    for i in range(4):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            module = f"model.layers.{i}.{part}"
            assert (rules.of(module) == DENSE) == bool(is_exception(module)), module
    assert rules.of("lm_head") == DENSE


def test_a_weight_that_is_stored_dense_needs_no_exception(write: Write) -> None:
    settings, encoder = CASES["fp8 channel"]
    quantized, dense = write(
        "qwen2", settings, lambda module: encoder if module.endswith("k_proj") else None
    )
    compute_alike(quantized, dense)


def test_mxfp4_stays_mxfp4_where_there_are_kernels(write: Write) -> None:
    quantized, _ = of_case(write, "mxfp4", "qwen3_moe")
    config, backend = load_config(quantized), Backend(CPU, torch.float32)
    held = config.held(backend)
    assert {layer.formats.qkv for layer in held.layers} == {MXFP4}
    model = Transformer(held)
    loader.load(model, quantized, backend)
    assert isinstance(model.layers[0].attention.qkv.weight, Mxfp4)  # type: ignore[union-attr]
    assert isinstance(model.layers[0].mlp.experts.gate_up, Mxfp4)  # type: ignore[union-attr]
