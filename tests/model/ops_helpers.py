"""Builds arguments of operations from plain tensors, for tests that call a backend directly."""

from typing import Any

import torch

from model.formats import DENSE, MXFP4, PER_HEAD
from model.ops.backend import Backend
from model.ops.cpu.backend import CpuBackend
from model.ops.mxfp4 import Mxfp4
from model.ops.specs import Experts, HeadLinear, Heads, Linear, Norm, NormSpec, RopeArgs

CPU = torch.device("cpu")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normally distributed values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_mxfp4(count: int, outputs: int, inputs: int, octaves: int = 6) -> Mxfp4:
    """Random codes with scales over some octaves."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, outputs, inputs // 32)
    blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 118 + octaves, shape, dtype=torch.uint8, generator=generator)
    return Mxfp4(blocks, scales)


def reference(dtype: torch.dtype = torch.float32) -> Backend:
    """The reference backend, which defines every operation."""
    return Backend(CPU, dtype)


def cpu_backend(dtype: torch.dtype = torch.float32, kv_dtype: str = "auto") -> CpuBackend:
    """The backend of a CPU, with the kernels that are in use now."""
    return CpuBackend(CPU, dtype, kv_dtype)


def linear_of(weight: Any, bias: torch.Tensor | None = None) -> Linear:
    """A linear layer whose weight [out, in] is in a backend's form already."""
    outputs, inputs = weight.shape[-2:]
    return Linear(inputs, outputs, bias is not None, DENSE, weight=weight, bias=bias)


def packed_linear(backend: Backend, weight: torch.Tensor, bias: Any = None) -> Linear:
    """A linear layer in the form that the backend is fastest with."""
    layer = Linear(weight.shape[1], weight.shape[0], bias is not None, DENSE, bias=bias)
    storage = backend.empty_weight(tuple(weight.shape))
    storage[: len(weight)].copy_(weight)
    layer.weight = backend.pack(storage)
    return layer


def head_linear_of(backend: Backend, weight: torch.Tensor) -> HeadLinear:
    """Linears of heads with this weight [heads, outputs, inputs], in the form of a backend."""
    heads, outputs, inputs = weight.shape
    storage = PER_HEAD.allocate(backend, tuple(weight.shape))
    for head in range(heads):
        storage[head].copy_(weight[head])
    return HeadLinear(heads, inputs, outputs, PER_HEAD, PER_HEAD.finish(backend, storage))


def norm_of(weight: torch.Tensor, eps: float = 1e-5) -> Norm:
    """A norm with this weight [size]."""
    return Norm(len(weight), NormSpec(eps), weight=weight.float())


def experts_of(
    gate_up: Any, gate_up_bias: torch.Tensor | None, down: Any, down_bias: torch.Tensor | None
) -> Experts:
    """Experts from stacked weights as the reference takes them: dense tensors or Mxfp4."""
    count, hidden, size = down.shape
    has_bias = gate_up_bias is not None
    form = DENSE if isinstance(down, torch.Tensor) else MXFP4
    return Experts(count, hidden, size, has_bias, form, gate_up, gate_up_bias, down, down_bias)


def packed_experts(backend: Backend, experts: Experts) -> Experts:
    """The same experts in a backend's form, filled by rows as from a checkpoint."""
    loaded = []
    for weights, parts in ((experts.gate_up, 2), (experts.down, 1)):
        storage: Any = experts.format.allocate(  # type: ignore[attr-defined]
            backend, tuple(weights.shape), parts
        )
        for expert in range(len(weights)):
            for first, last in ((0, 7), (7, weights.shape[1])):
                storage[expert][first:last].copy_(weights[expert][first:last])
        loaded.append(experts.format.finish(backend, storage))  # type: ignore[attr-defined]
    return Experts(
        experts.count,
        experts.hidden,
        experts.size,
        experts.has_bias,
        experts.format,
        loaded[0],
        experts.gate_up_bias,
        loaded[1],
        experts.down_bias,
    )


def heads_with_norms(heads: int, kv_heads: int, dim: int, norms: str) -> Heads:
    """Heads with norms "after the rotation" or "of all heads at once", or with "none"."""
    if norms == "none":
        return Heads(heads, kv_heads, dim)
    widths = (heads * dim, kv_heads * dim) if norms == "of all heads at once" else (dim, dim)
    q_norm, k_norm = (norm_of(rand(size, seed=size), 1e-6) for size in widths)
    return Heads(heads, kv_heads, dim, q_norm, k_norm, norms == "after the rotation")


def rope_args(
    kv: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> RopeArgs:
    """Arguments of rotary and KV write; kv [2, blocks, block_size, kv_heads, head_dim]."""
    q_norm, k_norm = (norm_of(w, 1e-6) for w in norms) if norms else (None, None)
    return RopeArgs(
        Heads(heads, kv.shape[3], kv.shape[4], q_norm, k_norm), cos_sin, kv, slot_mapping
    )
