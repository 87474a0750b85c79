"""Random inputs and layers for checks and timings, and the backend with some tiles changed."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from model.checks import FULL, attention
from model.checks.inputs import Inputs
from model.cost.known_models import named_config
from model.formats import DENSE, MXFP4
from model.layers.mlp import Mlp
from model.ops.backend import Backend
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.mxfp4 import Mxfp4
from model.ops.specs import Activation, Experts, Linear
from model.transformer import Layer

if TYPE_CHECKING:
    from model.ops.triton.backend import TritonBackend

CUDA = torch.device("cuda")
COMPUTES = "NULL_GPU" not in os.environ
"""Whether kernels compute: not on the GPU that null_gpu.py simulates, whose results are zero."""
GPT_OSS = Activation(7.0, 1.702)


def rand(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Return normally distributed values on the GPU, from the default generator."""
    return (torch.randn(shape, device=CUDA) * scale).to(dtype)


def paged_batch(lengths: list[tuple[int, int]]) -> tuple[ForwardBatch, GroupTables, int]:
    """Return a batch of sequences of (new tokens, context) in scattered blocks; its block count."""
    return attention.paged_batch(lengths, None, 16, Inputs(CUDA, torch.bfloat16, FULL))


def random_mxfp4(experts: int, outputs: int, inputs: int) -> Mxfp4:
    """Return random codes with scales that keep products close to one."""
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), device=CUDA)
    scales = torch.randint(119, 123, (experts, outputs, inputs // 32), device=CUDA)
    return Mxfp4(blocks.to(torch.uint8), scales.to(torch.uint8))


def kernels(
    dtype: torch.dtype = torch.bfloat16, *, kv_dtype: str = "auto", **tiles: Any
) -> "TritonBackend":
    """Return the backend of this GPU, with some fields of its `Tiles` changed."""
    from model.ops.triton.backend import TritonBackend
    from model.ops.triton.tiles import target_of

    target = target_of(CUDA)
    target = replace(target, tiles=replace(target.tiles, **tiles))
    return TritonBackend(CUDA, dtype, target, kv_dtype=kv_dtype)


def fused(dtype: torch.dtype = torch.bfloat16, **limits: Any) -> "TritonBackend":
    """Return the backend that fuses each norm only up to the number of rows given here.

    Without `one_row`, torch multiplies a single row.
    """
    none: dict[str, Any] = {"fused_qkv": 0, "fused_gate_up": 0, "fused_mlp": 0, "one_row": None}
    return kernels(dtype, **(none | limits))


def one_row() -> Any:
    """Return the tile that this GPU uses to multiply a single row."""
    return kernels().target.tiles.one_row


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """Return a linear layer with this weight [out, in]."""
    outputs, inputs = weight.shape
    return Linear(inputs, outputs, bias is not None, DENSE, weight=weight, bias=bias)


def experts_of(
    ops: Backend,
    weights: tuple[Any, Any],
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> Experts:
    """Return experts in a backend's form: gate_up and down (dense or Mxfp4) and their biases."""
    gate_up, down = weights
    count, hidden, size = down.shape
    is_mxfp4 = isinstance(down, Mxfp4)
    pack = ops.pack_mxfp4 if is_mxfp4 else ops.pack_experts
    return Experts(
        count,
        hidden,
        size,
        biases[0] is not None,
        MXFP4 if is_mxfp4 else DENSE,
        pack(gate_up),
        biases[0],
        pack(down),
        biases[1],
    )


def random_layer(name: str) -> Layer:
    """Return the first layer of a well-known dense model with random bf16 weights on the GPU."""
    config = named_config(name)
    layer = Layer(config, config.layers[0])
    assert isinstance(layer.mlp, Mlp)
    for parameter in layer.parameters():
        scale = 0.02 if parameter.attribute == "weight" and parameter.format else 1.0
        dtype = torch.float32 if parameter.is_float32 else torch.bfloat16
        values = rand(*parameter.shape, dtype=dtype, scale=scale)
        setattr(parameter.holder, parameter.attribute, values)
    return layer
