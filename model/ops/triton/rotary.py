"""Norms of heads, rotary embedding and the write to the KV cache: one pass over q, k and v."""

import torch
import triton
import triton.language as tl

from model.ops.specs import HeadLinear, Norm, RopeArgs
from model.ops.triton.kernels.kv_cache import rounded
from model.ops.triton.linear import multiply_heads
from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.tiles import Target


@triton.jit
def _norm_all_heads(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    out_ptr,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Normalise all queries or all keys of a token at once, or copy its values; grid (tokens, 3).

    qkv, out [tokens, HEADS + 2 · KV_HEADS, DIM]; q_norm float32 [HEADS · DIM], k_norm
    [KV_HEADS · DIM].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    at, part = tl.arange(0, BLOCK), tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * (HEADS + 2 * KV_HEADS) * DIM + at
    if part > 0:
        row += (HEADS + (part - 1) * KV_HEADS) * DIM
    size = tl.where(part == 0, HEADS * DIM, KV_HEADS * DIM)
    inside = at < size
    x = tl.load(qkv_ptr + row, inside, other=0.0)
    values = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / size + eps)
    weight = tl.load(q_norm_ptr + at, inside & (part == 0), other=0.0)
    weight += tl.load(k_norm_ptr + at, inside & (part == 1), other=0.0)
    normed = (values * scale * weight).to(x.dtype)
    tl.store(out_ptr + row, tl.where(part == 2, x, normed), inside)


@triton.jit
def _norm_pairs(
    a, b, q_norm_ptr, k_norm_ptr, place, gap, queries, keys, eps,
    DIM: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Normalise the heads whose pairs of values are a and b, float32 [BLOCK_H, HALF]."""
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM + eps)[:, None]
    # Queries and keys have different weights; the normalised values are not used.
    zero = tl.zeros((BLOCK_H, 1), tl.int32)
    q_norm, k_norm = q_norm_ptr + place[None, :] + zero, k_norm_ptr + place[None, :] + zero
    low = tl.load(q_norm, queries, other=0.0).to(tl.float32)
    low += tl.load(k_norm, keys, other=0.0).to(tl.float32)
    high = tl.load(q_norm + gap, queries, other=0.0).to(tl.float32)
    high += tl.load(k_norm + gap, keys, other=0.0).to(tl.float32)
    return a * scale * low, b * scale * high


@triton.jit
def _rotate_and_write(
    qkv_ptr,
    cos_sin_ptr,
    kv_ptr,
    slot_mapping_ptr,
    q_norm_ptr,
    k_norm_ptr,
    query_scale_ptr,
    out_ptr,
    value_offset: tl.int64,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NORMS: tl.constexpr,
    ROTATES_FIRST: tl.constexpr,
    NORMS_VALUES: tl.constexpr,
    VALUES_ARE_KEYS: tl.constexpr,
    QUERY_SCALE: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Process a block of heads of one token; grid (tokens, ⌈(HEADS + 2 · KV_HEADS) / BLOCK_H⌉).

    qkv [tokens, HEADS + 2 · KV_HEADS, DIM] (KV_HEADS once if VALUES_ARE_KEYS), cos_sin float32
    [tokens, ROTARY], kv [2, blocks, BLOCK_SIZE, KV_HEADS, DIM] with blocks BLOCK_STRIDE apart and
    the values value_offset after the keys, out [tokens, HEADS, DIM]. NORMS_VALUES: values are
    normalized without weights.
    The first ROTARY values of a head are rotated, with ROTATES_FIRST before the norms. query_scale
    float32 [tokens] multiplies queries. HALF is DIM / 2 rounded up to a power of 2.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    half = tl.arange(0, HALF)
    is_inside = half < DIM // 2
    is_rotated = half < ROTARY // 2
    # Where the first value of each pair is, and how far behind it the second is.
    if ROTARY == DIM:
        place = half
        gap: tl.constexpr = DIM // 2
    else:  # the values that are not rotated form pairs too: their halves follow the rotated ones
        place = tl.where(is_rotated, half, half + ROTARY // 2)
        gap = tl.where(is_rotated, ROTARY // 2, DIM // 2 - ROTARY // 2)[None, :]
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    mask = (head < HEADS + 2 * KV_HEADS)[:, None] & is_inside[None, :]

    source_head, WIDTH = head, HEADS + 2 * KV_HEADS
    if VALUES_ARE_KEYS:
        source_head, WIDTH = tl.where(is_value, head - KV_HEADS, head), HEADS + KV_HEADS
    source = qkv_ptr + (token * WIDTH + source_head[:, None]) * DIM + place[None, :]
    first = tl.load(source, mask, other=0.0)
    second = tl.load(source + gap, mask, other=0.0)
    dtype = first.dtype
    a, b = first.to(tl.float32), second.to(tl.float32)
    queries = is_query[:, None] & is_inside[None, :]
    keys = (head >= HEADS)[:, None] & is_inside[None, :]
    if NORMS and not ROTATES_FIRST:
        a, b = _norm_pairs(
            a, b, q_norm_ptr, k_norm_ptr, place, gap, queries, keys, eps, DIM, BLOCK_H
        )
        # Rounded as the result of a separate norm would be.
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    angles = cos_sin_ptr + token * ROTARY + half
    cos = tl.load(angles, is_rotated, other=1.0)[None, :]
    sin = tl.load(angles + ROTARY // 2, is_rotated, other=0.0)[None, :]
    left, right = a * cos - b * sin, b * cos + a * sin
    if NORMS and ROTATES_FIRST:
        # Rounded as the result of a separate rotation would be.
        left, right = _norm_pairs(
            left.to(dtype).to(tl.float32), right.to(dtype).to(tl.float32),
            q_norm_ptr, k_norm_ptr, place, gap, queries, keys, eps, DIM, BLOCK_H,
        )  # fmt: skip
    if QUERY_SCALE:
        scale = tl.load(query_scale_ptr + token)
        left = tl.where(is_query[:, None], left.to(dtype) * scale, left)
        right = tl.where(is_query[:, None], right.to(dtype) * scale, right)

    target = out_ptr + (token * HEADS + head[:, None]) * DIM + place[None, :]
    tl.store(target, left.to(dtype), mask & is_query[:, None])
    tl.store(target + gap, right.to(dtype), mask & is_query[:, None])
    slot = tl.load(slot_mapping_ptr + token)
    kv_head = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)
    target = kv_ptr + slot // BLOCK_SIZE * BLOCK_STRIDE
    target += (slot % BLOCK_SIZE * KV_HEADS + kv_head[:, None]) * DIM + place[None, :]
    target += tl.where(is_value, value_offset, 0)[:, None]
    is_written = mask & (head >= HEADS)[:, None]
    low, high = first.to(tl.float32), second.to(tl.float32)
    if NORMS_VALUES:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM + eps)[:, None]
        # Rounded as the result of a separate norm would be.
        low, high = (low * scale).to(dtype).to(tl.float32), (high * scale).to(dtype).to(tl.float32)
    left = tl.where(is_value[:, None], low, left)
    right = tl.where(is_value[:, None], high, right)
    tl.store(target, rounded(left, kv_ptr.dtype.element_ty), is_written)
    tl.store(target + gap, rounded(right, kv_ptr.dtype.element_ty), is_written)


def rotate_and_write(qkv: torch.Tensor, rope: RopeArgs, target: Target) -> torch.Tensor:
    """As `Backend.rotate_and_write`."""
    qkv = qkv.contiguous()
    tokens, _, dim = qkv.shape
    heads, kv = rope.heads, rope.kv
    width = heads.heads + 2 * heads.kv_heads
    out = qkv.new_empty(tokens, heads.heads, dim)
    norms = heads.q_norm, heads.k_norm
    eps = 0.0 if norms[0] is None else norms[0].eps
    q_norm, k_norm = (qkv if norm is None else norm.weight for norm in norms)
    if not tokens:
        return out
    if heads.has_whole_norms:
        projected, qkv = qkv, torch.empty_like(qkv)
        _norm_all_heads[(tokens, 3)](
            projected,
            q_norm,
            k_norm,
            qkv,
            eps,
            HEADS=heads.heads,
            KV_HEADS=heads.kv_heads,
            DIM=dim,
            BLOCK=triton.next_power_of_2(heads.heads * dim),
            num_warps=4,
            **target.launch_options,
        )
    block = min(8, triton.next_power_of_2(width))
    _rotate_and_write[(tokens, triton.cdiv(width, block))](
        qkv,
        rope.cos_sin.contiguous(),
        kv,
        rope.slot_mapping,
        q_norm,
        k_norm,
        qkv if rope.query_scale is None else rope.query_scale,
        out,
        kv.stride(0),
        eps,
        HEADS=heads.heads,
        KV_HEADS=heads.kv_heads,
        DIM=dim,
        ROTARY=rope.cos_sin.shape[1],
        BLOCK_SIZE=kv.shape[2],
        BLOCK_STRIDE=kv.stride(1),
        HALF=triton.next_power_of_2(dim // 2),
        BLOCK_H=block,
        NORMS=norms[0] is not None and not heads.has_whole_norms,
        ROTATES_FIRST=heads.rotates_before_norm,
        NORMS_VALUES=heads.norms_values,
        VALUES_ARE_KEYS=heads.values_are_keys,
        QUERY_SCALE=rope.query_scale is not None,
        num_warps=4,  # with 2, some forms spill registers
        **target.launch_options,
    )
    return out


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
    multiply_heads(query[..., : absorb.inputs], absorb, out[..., : norm.size])
    return out
