"""Queries of latents, the write of latents to the KV cache, and the products of each head."""

import torch
import triton
import triton.language as tl

from model.ops.specs import HeadLinear, Norm, RopeArgs
from model.ops.triton.kernels.kv_cache import rounded
from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.tiles import Target


@triton.jit
def _write_latents(
    query_ptr,
    latent_ptr,
    norm_ptr,
    cos_sin_ptr,
    kv_ptr,
    slot_mapping_ptr,
    out_ptr,
    eps,
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Norm and rotate a token's latent, or rotate a block of heads; grid (tokens, 1 + blocks).

    query [tokens, HEADS, PLAIN + ROTARY] → the last values of out [tokens, HEADS, RANK + ROTARY];
    latent [tokens, RANK + ROTARY], norm float32 [RANK], cos_sin float32 [tokens, ROTARY] → kv
    [slots, RANK + ROTARY]. HALF is ROTARY / 2 rounded up to a power of 2.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    GAP: tl.constexpr = ROTARY // 2
    half = tl.arange(0, HALF)
    is_half = half < GAP
    cos = tl.load(cos_sin_ptr + token * ROTARY + half, is_half, other=0.0)
    sin = tl.load(cos_sin_ptr + token * ROTARY + GAP + half, is_half, other=0.0)
    if part == 0:
        source = latent_ptr + token * (RANK + ROTARY)
        target = kv_ptr + tl.load(slot_mapping_ptr + token) * (RANK + ROTARY)
        at = tl.arange(0, BLOCK_R)
        inside = at < RANK
        x = tl.load(source + at, inside, other=0.0).to(tl.float32)
        weight = tl.load(norm_ptr + at, inside, other=0.0)
        x = x * tl.rsqrt(tl.sum(x * x) / RANK + eps) * weight
        tl.store(target + at, rounded(x, kv_ptr.dtype.element_ty), inside)
        first = tl.load(source + RANK + half, is_half, other=0.0).to(tl.float32)
        second = tl.load(source + RANK + GAP + half, is_half, other=0.0).to(tl.float32)
        left, right = first * cos - second * sin, second * cos + first * sin
        target += RANK + half
        tl.store(target, rounded(left, kv_ptr.dtype.element_ty), is_half)
        tl.store(target + GAP, rounded(right, kv_ptr.dtype.element_ty), is_half)
    else:
        head = (part - 1) * BLOCK_H + tl.arange(0, BLOCK_H)
        row = (token * HEADS + head)[:, None]
        mask = (head < HEADS)[:, None] & is_half[None, :]
        pairs = query_ptr + row * (PLAIN + ROTARY) + PLAIN + half[None, :]
        one = tl.load(pairs, mask, other=0.0).to(tl.float32)
        other = tl.load(pairs + GAP, mask, other=0.0).to(tl.float32)
        place = out_ptr + row * (RANK + ROTARY) + RANK + half[None, :]
        low = one * cos[None, :] - other * sin[None, :]
        high = other * cos[None, :] + one * sin[None, :]
        tl.store(place, low.to(out_ptr.dtype.element_ty), mask)
        tl.store(place + GAP, high.to(out_ptr.dtype.element_ty), mask)


def latent_query(
    query: torch.Tensor,
    latent: torch.Tensor,
    norm: Norm,
    absorb: HeadLinear,
    rope: RopeArgs,
    target: Target,
) -> torch.Tensor:
    """As `Backend.latent_query`."""
    query, latent = query.contiguous(), latent.contiguous()
    (tokens, heads, _), rotary = query.shape, rope.cos_sin.shape[1]
    out = query.new_empty(tokens, heads, norm.size + rotary)
    if not tokens:
        return out
    block = min(16, triton.next_power_of_2(heads))
    _write_latents[(tokens, 1 + triton.cdiv(heads, block))](
        query,
        latent,
        norm.weight,
        rope.cos_sin.contiguous(),
        rope.kv,
        rope.slot_mapping,
        out,
        norm.eps,
        HEADS=heads,
        PLAIN=absorb.inputs,
        RANK=norm.size,
        ROTARY=rotary,
        BLOCK_R=triton.next_power_of_2(norm.size),
        HALF=triton.next_power_of_2(rotary // 2),
        BLOCK_H=block,
        num_warps=4,
        **target.launch_options,
    )
    _multiply(query[..., : absorb.inputs], absorb, out[..., : norm.size])
    return out


def head_linear(x: torch.Tensor, linear: HeadLinear) -> torch.Tensor:
    """As `Backend.head_linear`."""
    out = x.new_empty(*x.shape[:2], linear.outputs)
    _multiply(x, linear, out)
    return out


def _multiply(x: torch.Tensor, linear: HeadLinear, out: torch.Tensor) -> None:
    """Fill out [tokens, heads, outputs] with the products of x [tokens, heads, inputs]."""
    torch.bmm(x.transpose(0, 1), linear.weight.transpose(1, 2), out=out.transpose(0, 1))
