"""The causal convolution of recurrent layers, and the gates of their and of attention's outputs."""

import torch
import triton
import triton.language as tl

from model.ops.forward_batch import ForwardBatch
from model.ops.specs import Norm
from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.tiles import Target

_TOKENS, _CHANNELS = 16, 64  # of a tile


@triton.jit
def _causal_conv(
    x_ptr,
    stride,
    weight_ptr,
    state_ptr,
    rows_ptr,
    starts_ptr,
    lengths_ptr,
    out_ptr,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    KERNEL_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Convolve some channels of one sequence; grid (sequences, ⌈CHANNELS / BLOCK_C⌉).

    Arguments as in `Backend.causal_conv`; KERNEL_BLOCK: a power of 2 of at least KERNEL.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    sequence = tl.program_id(0)
    first = tl.load(starts_ptr + sequence).to(tl.int64)
    count = (tl.load(starts_ptr + sequence + 1) - first).to(tl.int32)
    if count > 0:
        is_old = tl.load(lengths_ptr + sequence) > count
        channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = channel < CHANNELS
        row = tl.load(rows_ptr + sequence)
        state = state_ptr + row * (KERNEL - 1) * CHANNELS + channel[None, :]
        x = x_ptr + first * stride + channel[None, :]
        for begin in range(0, count, BLOCK_T):
            token = begin + tl.arange(0, BLOCK_T)
            total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
            for j in tl.static_range(KERNEL):
                at = token - (KERNEL - 1) + j
                exists = (token < count)[:, None] & inside[None, :]
                is_new = exists & (at >= 0)[:, None]
                value = tl.load(x + at[:, None].to(tl.int64) * stride, is_new, other=0.0)
                before = exists & (at < 0)[:, None] & is_old
                earlier = tl.load(state + (at + KERNEL - 1)[:, None] * CHANNELS, before, other=0.0)
                weight = tl.load(weight_ptr + j * CHANNELS + channel, inside, other=0.0)
                total += (value.to(tl.float32) + earlier.to(tl.float32)) * weight[None, :]
            out = total * tl.sigmoid(total)
            target = out_ptr + (first + token)[:, None] * CHANNELS + channel[None, :]
            tl.store(target, out.to(out_ptr.dtype.element_ty), (token < count)[:, None] & inside)
        slot = tl.arange(0, KERNEL_BLOCK)
        at = count - (KERNEL - 1) + slot
        exists = (slot < KERNEL - 1)[:, None] & inside[None, :]
        is_new = exists & (at >= 0)[:, None]
        value = tl.load(x + at[:, None].to(tl.int64) * stride, is_new, other=0.0)
        before = exists & (at < 0)[:, None] & is_old
        earlier = tl.load(state + (at + KERNEL - 1)[:, None] * CHANNELS, before, other=0.0)
        tl.debug_barrier()  # every thread has read the state
        tl.store(state + slot[:, None] * CHANNELS, value + earlier, exists)


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, batch: ForwardBatch, target: Target
) -> torch.Tensor:
    """As `Backend.causal_conv`."""
    kernel, channels = weight.shape
    assert batch.state_rows is not None
    out = x.new_empty(len(x), channels)
    if len(x):
        sequences = len(batch.state_rows)
        _causal_conv[(sequences, triton.cdiv(channels, _CHANNELS))](
            x,
            x.stride(0),
            weight,
            state,
            batch.state_rows,
            batch.cu_seqlens_q,
            batch.context_lens,
            out,
            CHANNELS=channels,
            KERNEL=kernel,
            KERNEL_BLOCK=triton.next_power_of_2(kernel),
            BLOCK_T=1 if batch.num_single == sequences else _TOKENS,
            BLOCK_C=_CHANNELS,
            num_warps=4,
            **target.launch_options,
        )
    return out


@triton.jit
def _gated_norm(
    x_ptr,
    gate_ptr,
    stride,
    weight_ptr,
    out_ptr,
    eps,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Norm and gate of one head of one token; grid (tokens, HEADS)."""
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    own = (token * HEADS + head) * SIZE + at
    x = tl.load(x_ptr + own, inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + token * stride + head * SIZE + at, inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, inside, other=0.0)
    out = x * tl.rsqrt(tl.sum(x * x) / SIZE + eps) * weight * (gate * tl.sigmoid(gate))
    tl.store(out_ptr + own, out.to(out_ptr.dtype.element_ty), inside)


def gated_norm(x: torch.Tensor, gate: torch.Tensor, norm: Norm, target: Target) -> torch.Tensor:
    """As `Backend.gated_norm`."""
    tokens, heads, size = x.shape
    out = x.new_empty(tokens, heads * size)
    if tokens:
        block = triton.next_power_of_2(size)
        _gated_norm[(tokens, heads)](
            x.contiguous(),
            gate,
            gate.stride(0),
            norm.weight,
            out,
            norm.eps,
            HEADS=heads,
            SIZE=size,
            BLOCK=block,
            num_warps=1 if block <= 256 else 4,
            **target.launch_options,
        )
    return out


@triton.jit
def _output_gate(
    x_ptr, gate_ptr, out_ptr, size, BLOCK: tl.constexpr, PROGRAMMATIC_LAUNCH: tl.constexpr
):
    """x · sigmoid(gate), of BLOCK values; grid (⌈size / BLOCK⌉,)."""
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(x_ptr + at, inside, other=0.0)
    gate = tl.load(gate_ptr + at, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x.to(tl.float32) * tl.sigmoid(gate)).to(x.dtype), inside)


def output_gate(x: torch.Tensor, gate: torch.Tensor, target: Target) -> torch.Tensor:
    """As `Backend.output_gate`."""
    x, gate = x.contiguous(), gate.contiguous()
    out = torch.empty_like(x)
    if len(x):
        grid = (triton.cdiv(x.numel(), 1024),)
        _output_gate[grid](
            x, gate, out, x.numel(), BLOCK=1024, num_warps=4, **target.launch_options
        )
    return out
