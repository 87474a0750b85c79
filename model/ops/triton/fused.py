"""Norms fused with QKV and rotary, with the router, or with an MLP: fewer launches at decode.

This is faster for few rows, where a launch takes longer than reading the activations again in every
program. `Tiles` has the largest number of rows for each fusion (`fused_qkv` and so on).
"""

import torch
import triton
import triton.language as tl

from model.ops.specs import Activation, Experts, ExpertShard, Linear, Norm, RopeArgs, Router
from model.ops.triton.experts import expert_pairs, sum_pairs
from model.ops.triton.kernels.linear import products_of_tile, weight_tile
from model.ops.triton.linear import (
    HALF,
    linear,
    norm_linear,
    tile_of,
)
from model.ops.triton.norm import swiglu
from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.rotary import rotate_and_write
from model.ops.triton.route import route_and_sort
from model.ops.triton.tiles import Target

_SLICE = 32  # columns of the MLP's inner size that one program computes


@triton.jit(do_not_specialize=["rows"])
def _norm_mlp(
    x_ptr,
    delta_ptr,
    norm_ptr,
    gate_up_ptr,
    down_ptr,
    sum_ptr,
    parts_ptr,
    rows,
    eps,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Compute one slice of the inner size and its part of the output; grid (slices,).

    x, sum float32, delta [rows, SIZE], norm float32 [SIZE], gate_up [2 · INNER, SIZE], down
    [SIZE, INNER] → parts float32 [slices, rows, SIZE].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    inner = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    row = tl.arange(0, BLOCK_M)
    gate, up, squares = products_of_tile(
        x_ptr, delta_ptr, norm_ptr, gate_up_ptr, sum_ptr, rows, inner,
        SIZE, INNER, INNER, BLOCK_M, BLOCK_I, BLOCK_K, True,
    )  # fmt: skip
    scale = tl.rsqrt(squares / SIZE + eps)[None, :]
    hidden = swiglu(gate * scale, up * scale, None, 1.0).to(down_ptr.dtype.element_ty)
    for n in tl.range(0, SIZE, BLOCK_N):
        out = n + tl.arange(0, BLOCK_N)
        w = weight_tile(down_ptr, out, inner, SIZE, INNER, BLOCK_N, BLOCK_I)
        part = tl.dot(w, hidden, input_precision="ieee")
        place = (tl.program_id(0) * rows + row)[None, :] * SIZE + out[:, None]
        tl.store(parts_ptr + place, part, (row < rows)[None, :] & (out < SIZE)[:, None])


@triton.jit(do_not_specialize=["slices", "stride"])
def _sum_mlp_slices(
    parts_ptr,
    out_ptr,
    slices,
    stride,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Sum parts float32 [slices, stride] → out [stride], always in the same order."""
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.range(0, slices, BLOCK_S):
        part = s + tl.arange(0, BLOCK_S)
        inside = (part < slices)[:, None] & (at < stride)[None, :]
        total += tl.sum(tl.load(parts_ptr + part[:, None] * stride + at[None, :], inside, 0.0), 0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), at < stride)


def norm_qkv(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    norm: Norm,
    qkv: Linear,
    rope: RopeArgs,
    target: Target,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Backend.norm_qkv`, in one kernel or two.

    Two if a program of the first would not have what the rotation of its columns needs: a whole
    head for norms of heads, or both halves of the rotated part of a head.
    """
    heads = rope.heads
    rotates_whole_heads = rope.cos_sin.shape[1] == heads.head_dim
    is_plain = heads.q_norm is None and rope.query_scale is None
    if is_plain and rotates_whole_heads and heads.head_dim // 2 % HALF == 0:
        return norm_linear(x, delta, norm, qkv, target, rope=rope)
    summed, projected = norm_linear(x, delta, norm, qkv, target)
    return summed, rotate_and_write(projected.unflatten(-1, (-1, heads.head_dim)), rope, target)


def norm_mlp(
    x: torch.Tensor,
    delta: torch.Tensor,
    norm: Norm,
    gate_up: Linear,
    down: Linear,
    target: Target,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Backend.norm_mlp` for plain SwiGLU, either whole or without the down projection."""
    if len(x) <= target.tiles.fused_mlp and not gate_up.has_bias and not down.has_bias:
        return _mlp(x, delta, norm, gate_up.weight, down.weight, target)
    summed, hidden = norm_linear(x, delta, norm, gate_up, target, is_gated=True)
    return summed, linear(hidden, down, target)


def norm_experts(
    x: torch.Tensor,
    delta: torch.Tensor,
    norm: Norm,
    router: Router,
    experts: Experts,
    activation: Activation,
    shard: ExpertShard,
    target: Target,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norm and router, route and sort, and the experts' two products.

    Returns the result of `Backend.norm_experts` without the shared expert, and between its parts
    the norm. Experts are left unsummed, [tokens, top_k, hidden], if the shard holds all of them.
    """
    normed = torch.empty_like(x, dtype=router.linear.weight.dtype)
    logits = x.new_empty(len(x), router.linear.outputs, dtype=torch.float32)
    summed, _ = norm_linear(x, delta, norm, router.linear, target, out=logits, normed=normed)
    first = shard.rank * experts.count
    chosen, weights, order, expert_starts = route_and_sort(
        logits, router, first, experts.count, target
    )
    pairs = expert_pairs(
        normed, weights, order, expert_starts, experts, activation, shard.size, target
    )
    if shard.size == 1:
        return summed, normed, pairs
    return summed, normed, sum_pairs(pairs, chosen, first, experts.count, target)


def _mlp(
    x: torch.Tensor,
    delta: torch.Tensor,
    norm: Norm,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    target: Target,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta [rows, size], gate_up [2 · inner, size], down [size, inner] → (x + delta, mlp).

    The MLP of the norm of x + delta has plain SwiGLU and no biases.
    """
    rows, size = x.shape
    tile = tile_of(rows, down.dtype, target)
    inner = down.shape[1]
    slices = triton.cdiv(inner, _SLICE)
    summed, out = torch.empty_like(x), torch.empty_like(delta)
    parts = x.new_empty(slices, rows, size, dtype=torch.float32)
    _norm_mlp[(slices,)](
        x,
        delta,
        norm.weight,
        gate_up,
        down,
        summed,
        parts,
        rows,
        norm.eps,
        SIZE=size,
        INNER=inner,
        BLOCK_M=tile.m,
        BLOCK_I=_SLICE,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        **tile.options,
        **target.launch_options,
    )
    block = 128
    _sum_mlp_slices[(triton.cdiv(rows * size, block),)](
        parts,
        out,
        slices,
        rows * size,
        BLOCK_S=16,
        BLOCK=block,
        num_warps=4,
        **target.launch_options,
    )
    return summed, out
