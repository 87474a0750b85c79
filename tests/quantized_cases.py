"""The `quantization_config` of each format, and the encoder of its weights."""

from typing import Any

from tests.quantized_checkpoints import (
    Encoder,
    awq,
    compressed,
    fp8,
    fp8_blocks,
    gptq,
    mxfp4,
    nvfp4,
)


def compressed_tensors(form: str, weights: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The settings of compressed-tensors with one group."""
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        **settings,
    }


def grouped(bits: int, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    """The settings of integers in groups of 32."""
    form = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32}
    return {**form, "symmetric": symmetric, **more}


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
NVFP4 = compressed_tensors(
    "nvfp4-pack-quantized", {**FLOAT4, "strategy": "tensor_group", "group_size": 16}
)
MXFP4_SETTINGS = compressed_tensors(
    "mxfp4-pack-quantized", {**FLOAT4, "strategy": "group", "group_size": 32}
)
W4 = compressed_tensors("pack-quantized", grouped(4))
# name → settings and encoder; those of WITH_EXPERTS are also checked with experts.
CASES: dict[str, tuple[dict[str, Any], Encoder]] = {
    "fp8 blocks": ({**FP8, "weight_block_size": [128, 128]}, fp8_blocks(128, 128)),
    "fp8 small blocks": ({**FP8, "weight_block_size": [40, 24], "fmt": "e4m3"}, fp8_blocks(40, 24)),
    "fp8 exponents": (
        {**FP8, "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        fp8_blocks(32, 32, exponents=True),
    ),
    "fp8 tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        fp8(lambda outputs: (), "weight_scale"),
    ),
    "fp8 channel": (FP8, fp8(lambda outputs: (outputs, 1), "weight_scale_inv")),
    "w4 group": (W4, compressed(4, 32, True)),
    "w4 asymmetric": (
        compressed_tensors("pack-quantized", grouped(4, False)),
        compressed(4, 32, False),
    ),
    "w8 asymmetric": (
        compressed_tensors("pack-quantized", grouped(8, False)),
        compressed(8, 32, False),
    ),
    "w8 channel": (compressed_tensors("pack-quantized", CHANNEL), compressed(8, None, True)),
    "w4 group order": (
        compressed_tensors("pack-quantized", grouped(4, False, actorder="group")),
        compressed(4, 32, False, order="mixed"),
    ),
    "w4 weight order": (
        compressed_tensors("pack-quantized", grouped(4, actorder="weight")),
        compressed(4, 32, True, order="unused"),
    ),
    "w8a8 int": (
        compressed_tensors("int-quantized", CHANNEL),
        compressed(8, None, True, packed=False),
    ),
    "w8a8 int asymmetric": (
        compressed_tensors("int-quantized", {**CHANNEL, "symmetric": False}),
        compressed(8, None, False, packed=False),
    ),
    "compressed fp8": (
        compressed_tensors("float-quantized", {**FLOAT8, "strategy": "channel"}),
        fp8(lambda outputs: (outputs, 1), "weight_scale"),
    ),
    "compressed fp8 blocks": (
        compressed_tensors(
            "float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [16, 16]}
        ),
        fp8_blocks(16, 16, "weight_scale"),
    ),
    "mxfp8": (
        compressed_tensors("mxfp8-quantized", {**FLOAT8, "strategy": "group", "group_size": 32}),
        fp8_blocks(1, 32, "weight_scale", exponents=True),
    ),
    "nvfp4": (NVFP4, nvfp4(modelopt=False)),
    "mxfp4": (MXFP4_SETTINGS, mxfp4),
    "modelopt nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.mlp.gate"]},
        nvfp4(modelopt=True),
    ),
    "modelopt fp8": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        fp8(lambda outputs: (), "weight_scale"),
    ),
    "gptq": (GPTQ, gptq(4, 32)),
    "gptq order": ({**GPTQ, "desc_act": True}, gptq(4, 32, order=True)),
    "gptq 8 bits": ({**GPTQ, "bits": 8, "group_size": -1, "sym": True}, gptq(8, None)),
    "gptq v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq(4, 32, version=2)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq(32)),
    "awq channel": ({"quant_method": "awq", "bits": 4, "group_size": -1}, awq(None)),
}
WITH_EXPERTS = ("fp8 small blocks", "w4 group", "w8a8 int", "nvfp4", "mxfp4", "gptq order", "awq")
