"""RMSNorm of the residual stream and SwiGLU, each in one pass over the rows."""

import torch
import triton
import triton.language as tl

from model.ops.specs import Activation, Norm
from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.tiles import Target


@triton.jit
def add_delta(x, delta_ptr, at, inside, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """Add a delta to x, float32: elements `at` of its PARTS, SIZE apart, summed in their order."""
    delta = tl.load(delta_ptr + at, inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        delta += tl.load(delta_ptr + part * SIZE + at, inside, other=0.0).to(tl.float32)
    return x + delta


def delta_parts(delta: torch.Tensor | None) -> int:
    """Return how many parts a delta [tokens, size] or [tokens, parts, size] has; 0 without one."""
    if delta is None:
        return 0
    return delta.shape[1] if delta.dim() == 3 else 1


@triton.jit
def _add_rms_norm(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    IDENTITY: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Normalise one row of x + delta, or with IDENTITY only convert it; grid (tokens,).

    x, sum float32, out [tokens, SIZE], delta [tokens, PARTS, SIZE] (PARTS 0: none), weight float32
    [SIZE].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row = tl.program_id(0).to(tl.int64) * SIZE
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    x = tl.load(x_ptr + row + at, inside, other=0.0)
    if PARTS:
        x = add_delta(x, delta_ptr + row * PARTS, at, inside, SIZE, PARTS)
        tl.store(sum_ptr + row + at, x, inside)
    if not IDENTITY:
        weight = tl.load(weight_ptr + at, inside, other=0.0)
        x = x * tl.rsqrt(tl.sum(x * x) / SIZE + eps) * weight
    tl.store(out_ptr + row + at, x.to(out_ptr.dtype.element_ty), inside)


def add_rms_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    norm: Norm,
    dtype: torch.dtype,
    target: Target,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Backend.add_rms_norm`; dtype: of the norm."""
    x = x.contiguous()
    tokens, size = x.shape
    out = torch.empty_like(x, dtype=dtype)
    summed = x if delta is None else torch.empty_like(x)
    if tokens:
        block = triton.next_power_of_2(size)
        _add_rms_norm[(tokens,)](
            x,
            x if delta is None else delta.contiguous(),
            x if norm.is_identity else norm.weight,
            summed,
            out,
            norm.eps,
            SIZE=size,
            BLOCK=block,
            PARTS=delta_parts(delta),
            IDENTITY=norm.is_identity,
            num_warps=min(8, max(1, block // 512)),
            **target.launch_options,
        )
    return summed, out


@triton.jit
def swiglu(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """SwiGLU of gate and up, float32 of one shape: plain if LIMIT is None, else that of gpt-oss."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1
        gate = gate * tl.sigmoid(ALPHA * gate)
    else:
        gate = gate * tl.sigmoid(gate)
    return gate * up


@triton.jit
def geglu(gate, up):
    """GELU of the gate by its approximation with tanh, times up; float32 of one shape.

    (1 + tanh(y)) / 2 is the sigmoid of 2y, and 2y = 2 · √(2 / π) · (gate + 0.044715 · gate³).
    """
    return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up


@triton.jit
def _activate(
    gate_up_ptr,
    out_ptr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    GELU: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """SwiGLU, or GELU times up, of a block of one row; grid (tokens, ⌈SIZE / BLOCK⌉).

    gate_up [tokens, 2 · SIZE] → out [tokens, SIZE].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    source = gate_up_ptr + row * 2 * SIZE + at
    gate = tl.load(source, inside, other=0.0)
    up = tl.load(source + SIZE, inside, other=0.0)
    if GELU:
        out = geglu(gate.to(tl.float32), up.to(tl.float32))
    else:
        out = swiglu(gate.to(tl.float32), up.to(tl.float32), LIMIT, ALPHA)
    tl.store(out_ptr + row * SIZE + at, out.to(gate.dtype), inside)


@triton.jit
def _add_gated(
    x_ptr,
    y_ptr,
    gate_ptr,
    out_ptr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Add y [tokens, SIZE], by the sigmoid of its gate [tokens], to x; grid (tokens, blocks).

    x [tokens, PARTS, SIZE] → out [tokens, SIZE].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    y = tl.load(y_ptr + row * SIZE + at, inside, other=0.0).to(tl.float32)
    if GATED:
        y *= tl.sigmoid(tl.load(gate_ptr + row).to(tl.float32))
    y = add_delta(y, x_ptr + row * PARTS * SIZE, at, inside, SIZE, PARTS)
    tl.store(out_ptr + row * SIZE + at, y.to(out_ptr.dtype.element_ty), inside)


def add_gated(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, target: Target
) -> torch.Tensor:
    """As `Backend.add_gated`."""
    x, y = x.contiguous(), y.contiguous()
    tokens, size = y.shape
    out = torch.empty_like(y)
    if tokens:
        block = min(1024, triton.next_power_of_2(size))
        _add_gated[(tokens, triton.cdiv(size, block))](
            x,
            y,
            y if gate is None else gate.contiguous(),
            out,
            SIZE=size,
            BLOCK=block,
            PARTS=delta_parts(x),
            GATED=gate is not None,
            num_warps=4,
            **target.launch_options,
        )
    return out


def activate(gate_up: torch.Tensor, activation: Activation, target: Target) -> torch.Tensor:
    """As `Backend.activate`."""
    gate_up = gate_up.contiguous()
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, size)
    if tokens:
        block = min(1024, triton.next_power_of_2(size))
        _activate[(tokens, triton.cdiv(size, block))](
            gate_up,
            out,
            SIZE=size,
            BLOCK=block,
            LIMIT=activation.limit,
            ALPHA=activation.alpha,
            GELU=activation.kind == "gelu_tanh",
            num_warps=4,
            **target.launch_options,
        )
    return out
