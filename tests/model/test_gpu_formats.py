"""Weights of quantized checkpoints as a GPU keeps them: packed, with the values of the files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model import Transformer, load_config, loader
from model.ops.backend import Backend
from model.sharding import Shard
from tests.model.quantized import of_case
from tests.quantized_cases import CASES
from tests.quantized_checkpoints import Write

pytest.importorskip("triton")

CPU = torch.device("cpu")
# The formats that are packed, and their kinds; all others become dense.
KINDS = {
    "fp8 exponents": "fp8",
    "fp8 tensor": "fp8x8",
    "fp8 channel": "fp8x8",
    "compressed fp8": "fp8",
    "mxfp8": "fp8",
    "modelopt fp8": "fp8x8",
    "w4 group": "int4",
    "w4 asymmetric": "int4",
    "w8 asymmetric": "int8",
    "w8 channel": "int8",
    "w4 weight order": "int4",
    "w8a8 int": "int8",
    "w8a8 int asymmetric": "int8",
    "gptq": "int4",
    "gptq 8 bits": "int8",
    "gptq v2": "int4",
    "awq": "int4",
    "awq channel": "int4",
}


def kernels(dtype: torch.dtype = torch.float32) -> Backend:
    from model.ops.triton.backend import TritonBackend

    return TritonBackend(CPU, dtype)


def weights(folder: Path, backend: Backend, shard: Shard | None = None) -> list[Any]:
    """The linears of the first layer."""
    model = Transformer(load_config(folder).held(backend), shard or Shard(0, 1))
    loader.load(model, folder, backend)
    layer: Any = model.layers[0]
    attention, mlp = layer.attention, layer.mlp
    if hasattr(mlp, "experts"):
        return [attention.qkv.weight, mlp.experts.gate_up, mlp.experts.down]
    return [attention.qkv.weight, attention.out.weight, mlp.gate_up.weight, mlp.down.weight]


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize("name", CASES)
def test_weights_stay_packed_and_keep_their_values(name: str, family: str, write: Write) -> None:
    if family == "qwen3_moe" and name not in ("w4 group", "w8a8 int", "awq", "fp8 exponents"):
        return
    quantized, dense = of_case(write, name, family)
    found, expected = weights(quantized, kernels()), weights(dense, Backend(CPU, torch.float32))
    kinds = {getattr(weight, "kind", "dense") for weight in found}
    assert kinds <= {KINDS.get(name, "dense")}
    for weight, values in zip(found, expected, strict=True):
        own = weight if isinstance(weight, torch.Tensor) else getattr(weight, "values", None)
        own = weight.dense(torch.float32) if own is None else own
        torch.testing.assert_close(own, values, rtol=1e-5, atol=1e-7)
