"""Quantized copies of tiny checkpoints, packed here as the formats' documentation describes it.

Each encoder takes a weight float32 [out, in] and returns its tensors, by what follows the module's
name, and the values that they stand for, computed in float64. Numbers are random rather than close
to the weight's: only the layout matters.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from model.ops.mxfp4 import FP4_VALUES
from tests.checkpoints import edit_config

Tensors = dict[str, torch.Tensor]
Encoded = tuple[Tensors, np.ndarray[Any, Any]]
Encoder = Callable[[torch.Tensor, np.random.Generator], Encoded]
Array = np.ndarray[Any, Any]
Pair = tuple[Path, Path]
"""A quantized checkpoint, and the dense one with the same values."""
Write = Callable[[str, dict[str, Any], Callable[[str], Encoder | None]], Pair]
"""Writes a pair: the family, the `quantization_config`, and the encoder of each module."""


def _scales(random: np.random.Generator, *shape: int, size: float) -> Array:
    """Scales that bfloat16 and float16 represent, so that values of `size` codes are about 0.2."""
    scales = random.uniform(0.5, 1.5, shape) * 0.2 / size
    return torch.tensor(scales).bfloat16().double().numpy()


def _half(scales: Array) -> torch.Tensor:
    return torch.tensor(scales).bfloat16()


def _words(codes: Array, bits: int) -> Array:
    """Unsigned codes [rows, n] → int32 words [rows, n · bits / 32], the first in the low bits."""
    per_word = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // per_word), dtype=np.uint32)
    for i in range(per_word):
        words |= codes[:, i::per_word].astype(np.uint32) << np.uint32(bits * i)
    return words.view(np.int32)


def _tensor(array: Array) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(array))


def _fp8(weight: torch.Tensor) -> tuple[torch.Tensor, Array]:
    """Random numbers of E4M3 [out, in], and their values."""
    codes = (weight * 100).to(torch.float8_e4m3fn)
    return codes, codes.double().numpy()


def fp8_blocks(
    rows: int, columns: int, name: str = "weight_scale_inv", exponents: bool = False
) -> Encoder:
    """E4M3 with a scale for each block; the blocks at the end may be smaller."""

    def encode(weight: torch.Tensor, random: np.random.Generator) -> Encoded:
        outputs, inputs = weight.shape
        codes, values = _fp8(weight)
        count = -(-outputs // rows), -(-inputs // columns)
        scales: Array = random.uniform(0.005, 0.015, count).astype(np.float32)
        stored = torch.tensor(scales)
        if exponents:
            stored = torch.tensor(random.integers(118, 122, count).astype(np.uint8))
            scales = 2.0 ** (stored.double().numpy() - 127)
        spread = scales.astype(np.float64).repeat(rows, 0).repeat(columns, 1)[:outputs, :inputs]
        return {"weight": codes, name: stored}, values * spread

    return encode


def fp8(shape: Callable[[int], tuple[int, ...]], name: str) -> Encoder:
    """E4M3 with one scale, or one for each output; shape: of the scales, by the outputs."""

    def encode(weight: torch.Tensor, random: np.random.Generator) -> Encoded:
        codes, values = _fp8(weight)
        scales = random.uniform(0.005, 0.015, shape(len(weight))).astype(np.float32)
        found = {
            "weight": codes,
            name: torch.tensor(scales),
            "input_scale": torch.tensor(0.5),
        }
        return found, values * scales.astype(np.float64).reshape(-1, 1)

    return encode


def compressed(
    bits: int, group: int | None, symmetric: bool, packed: bool = True, order: str = ""
) -> Encoder:
    """compressed-tensors: signed integers, in words or in bytes.

    order: "" or "mixed" for groups of inputs that are not neighbours, "unused" for an index of -1.
    """

    def encode(weight: torch.Tensor, random: np.random.Generator) -> Encoded:
        outputs, inputs = weight.shape
        half = 1 << (bits - 1)
        codes = random.integers(-half, half, (outputs, inputs))
        groups = 1 if group is None else inputs // group
        scales = _scales(random, outputs, groups, size=half)
        zeros = random.integers(-half // 2, half // 2, (outputs, groups))
        zeros = np.zeros_like(zeros) if symmetric else zeros
        index = np.arange(inputs) // (inputs // groups)
        found = {"weight_scale": _half(scales)}
        if order:
            index = random.permutation(index) if order == "mixed" else index
            stored = index if order == "mixed" else np.full_like(index, -1)
            found["weight_g_idx"] = _tensor(stored.astype(np.int32))
        if packed:
            found["weight_packed"] = _tensor(_words(codes + half, bits))
            found["weight_shape"] = torch.tensor([outputs, inputs])
            if not symmetric:
                found["weight_zero_point"] = _tensor(_words((zeros + half).T, bits).T)
        else:
            found["weight"] = _tensor(codes.astype(np.int8))
            if not symmetric:
                found["weight_zero_point"] = _tensor(zeros.astype(np.int8))
        return found, (codes - zeros[:, index]) * scales[:, index]

    return encode


def gptq(bits: int, group: int | None, order: bool = False, version: int = 1) -> Encoder:
    """GPTQ: transposed, inputs along the words; zero points along the outputs, minus 1 in v1."""

    def encode(weight: torch.Tensor, random: np.random.Generator) -> Encoded:
        outputs, inputs = weight.shape
        codes = random.integers(0, 1 << bits, (inputs, outputs))
        groups = 1 if group is None else inputs // group
        scales = _scales(random, groups, outputs, size=1 << bits)
        zeros = random.integers(1 if version == 1 else 0, 1 << bits, (groups, outputs))
        index = np.arange(inputs) // (inputs // groups)
        if order:
            index = random.permutation(index)
        stored = zeros - 1 if version == 1 else zeros
        found = {
            "qweight": _tensor(_words(codes.T, bits).T),
            "qzeros": _tensor(_words(stored, bits)),
            "scales": _half(scales),
            "g_idx": _tensor(index.astype(np.int32)),
        }
        return found, ((codes - zeros[index]) * scales[index]).T

    return encode


def awq(group: int | None) -> Encoder:
    """AWQ: transposed, outputs along the words in the order 0, 2, 4, 6, 1, 3, 5, 7."""

    def interleaved(codes: Array) -> Array:
        eights = codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return _words(eights.reshape(codes.shape), 4)

    def encode(weight: torch.Tensor, random: np.random.Generator) -> Encoded:
        outputs, inputs = weight.shape
        groups = 1 if group is None else inputs // group
        codes = random.integers(0, 16, (inputs, outputs))
        zeros = random.integers(0, 16, (groups, outputs))
        scales = _scales(random, groups, outputs, size=16)
        index = np.arange(inputs) // (inputs // groups)
        found = {
            "qweight": _tensor(interleaved(codes)),
            "qzeros": _tensor(interleaved(zeros)),
            "scales": _half(scales).half(),
        }
        return found, ((codes - zeros[index]) * scales[index]).T

    return encode


def _fp4(shape: tuple[int, ...], random: np.random.Generator) -> tuple[torch.Tensor, Array]:
    """Random codes of E2M1, two in a byte, and their values [out, in]."""
    codes = random.integers(0, 16, shape)
    values = np.array([*FP4_VALUES, *(-value for value in FP4_VALUES)])[codes]
    return _tensor((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)), values


def nvfp4(modelopt: bool) -> Encoder:
    """NVFP4: scales of 16 values in E4M3, and one more scale for all."""

    def encode(weight: torch.Tensor, random: np.random.Generator) -> Encoded:
        outputs, inputs = weight.shape
        packed, values = _fp4((outputs, inputs), random)
        scales = torch.tensor(random.uniform(20, 400, (outputs, inputs // 16)))
        scales = scales.to(torch.float8_e4m3fn)
        last = np.float32(random.uniform(2e3, 4e3))
        of_all = float(np.float32(1 / last)) if modelopt else 1 / float(last)
        values = values * scales.double().numpy().repeat(16, 1) * of_all
        found = {"weight_scale": scales, "input_global_scale": torch.tensor([3.0])}
        if modelopt:
            found |= {"weight": packed, "weight_scale_2": torch.tensor(of_all)}
        else:
            found |= {"weight_packed": packed, "weight_global_scale": torch.tensor([last])}
        return found, values

    return encode


def mxfp4(weight: torch.Tensor, random: np.random.Generator) -> Encoded:
    """MXFP4 as compressed-tensors stores it."""
    outputs, inputs = weight.shape
    packed, values = _fp4((outputs, inputs), random)
    exponents = random.integers(120, 124, (outputs, inputs // 32))
    found = {"weight_packed": packed, "weight_scale": _tensor(exponents.astype(np.uint8))}
    return found, values * (2.0 ** (exponents - 127)).repeat(32, 1)


def is_linear(module: str) -> bool:
    """Whether a module is a linear of a layer, without the router."""
    return module.endswith(("_proj", "_proj_with_mqa"))


def write_quantized(
    source: Path,
    quantized: Path,
    dense: Path,
    settings: dict[str, Any],
    encoder: Callable[[str], Encoder | None],
) -> None:
    """Write a quantized copy of a checkpoint, and a dense one with the same values in float32.

    encoder: that of a module, by its name; None for one that stays as it is.
    """
    random = np.random.default_rng(0)
    shutil.copytree(source, quantized, dirs_exist_ok=True)
    shutil.copytree(source, dense, dirs_exist_ok=True)
    packed: Tensors = {}
    plain: Tensors = {}
    for name, value in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        encode = encoder(module) if name.endswith(".weight") and value.dim() == 2 else None
        if encode is None:
            packed[name] = plain[name] = value
            continue
        tensors, values = encode(value, random)
        packed |= {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}
        plain[name] = _tensor(values).float()
    save_file(packed, quantized / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, dense / "model.safetensors", metadata={"format": "pt"})
    edit_config(quantized, quantization_config=json.loads(json.dumps(settings)))
