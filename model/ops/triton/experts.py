"""Mixture-of-experts MLP as two grouped matrix products over rows sorted by expert.

Outputs are the rows of a tile and tokens its columns: at decode a few tokens then fill the short
side of the matrix instruction, and weights unpacked from MXFP4 go into it from registers.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from model.ops.specs import Activation, Experts, ExpertShard
from model.ops.triton.mxfp4 import unpack
from model.ops.triton.norm import gated
from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.sort_by_expert import group_by_expert
from model.ops.triton.tiles import Target, Tile, for_dtype


@triton.jit
def _find(starts_ptr, block, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which expert's rows row block `block` holds → (expert, first row, end of its rows).

    Every expert's rows fill whole blocks; behind the last one the expert is EXPERTS.
    """
    expert = tl.arange(0, BLOCK_E)
    start = tl.load(starts_ptr + expert, expert < EXPERTS, other=0)
    end = tl.load(starts_ptr + expert + 1, expert < EXPERTS, other=0)
    blocks = (end - start + BLOCK_M - 1) // BLOCK_M
    upto = tl.cumsum(blocks, 0)
    found = tl.sum(((upto <= block) & (expert < EXPERTS)).to(tl.int32), 0)
    before = tl.sum(tl.where(expert < found, blocks, 0), 0)
    inside = found < EXPERTS
    first = tl.load(starts_ptr + found, inside, other=0) + (block - before) * BLOCK_M
    end = tl.load(starts_ptr + found + 1, inside, other=0)
    return found, first, end


@triton.jit
def _weights(
    weight_ptr,
    scale_ptr,
    out,
    k,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    VENDOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Rows `out` [BLOCK_N] and columns [k, k + BLOCK_K) of a weight [OUT, IN], plain or as words.

    Of words the scales of one column follow each other, SCALE_ROW to the next; BLOCK_K is 32, 64
    or 128, so that a row has one word of them.
    """
    whole: tl.constexpr = IN % BLOCK_K == 0
    row = out[:, None].to(tl.int64)
    inside = (out < OUT)[:, None]
    if PACKED:
        at = k // 8 + tl.arange(0, BLOCK_K // 8)
        kept = inside if whole else inside & (at < IN // 8)[None, :]
        words = tl.load(weight_ptr + row * (IN // 8) + at[None, :], kept, other=0)
        scales = tl.load(scale_ptr + k // 128 * SCALE_ROW + out, out < OUT, other=0)
        return unpack(words, scales, k // 32 % 4, VENDOR, DTYPE)
    else:  # not after it: the compiler would see both returns
        at = k + tl.arange(0, BLOCK_K)
        kept = inside if whole else inside & (at < IN)[None, :]
        return tl.load(weight_ptr + row * IN + at[None, :], kept, other=0.0)


@triton.jit
def _multiplied(w, x, total, PACKED: tl.constexpr, VENDOR: tl.constexpr):
    """total + w · x, ended before what comes next if w was unpacked on NVIDIA's GPUs.

    Hopper multiplies while a program goes on, and w then is in registers: compilers have put the
    next weights into them too early (triton-lang/triton#9433). They wait where something, if it is
    nothing, is done with the sum.
    """
    total = tl.dot(w, x, total, input_precision="ieee")
    if PACKED and VENDOR == "nvidia":
        total = tl.inline_asm_elementwise(
            "// $0", "=r,0", [total], dtype=tl.float32, is_pure=True, pack=1
        )
    return total


@triton.jit
def _gate_up_rows(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    order_ptr,
    out_ptr,
    expert,
    first,
    end,
    out,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Columns `out` of BLOCK_M rows of `expert` from `first` on, as `_gate_up`."""
    row = first + tl.arange(0, BLOCK_M)
    token = tl.load(order_ptr + row, row < end, other=0) // TOP_K
    dtype = x_ptr.dtype.element_ty
    source = x_ptr + token[:, None].to(tl.int64) * HIDDEN
    weight_ptr += expert.to(tl.int64) * (2 * SIZE * HIDDEN // (8 if PACKED else 1))
    up_ptr = weight_ptr + SIZE * HIDDEN // (8 if PACKED else 1)
    ROW: tl.constexpr = 2 * SIZE
    scale_ptr += expert.to(tl.int64) * (ROW * ((HIDDEN + 127) // 128))
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, HIDDEN, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        kept = (row < end)[:, None]
        if HIDDEN % BLOCK_K != 0:
            kept = kept & (at < HIDDEN)[None, :]
        x = tl.load(source + at[None, :], kept, other=0.0).T
        w = _weights(
            weight_ptr, scale_ptr, out, k, SIZE, HIDDEN, ROW, BLOCK_K, PACKED, VENDOR, dtype
        )
        gate = _multiplied(w, x, gate, PACKED, VENDOR)
        w = _weights(
            up_ptr, scale_ptr + SIZE, out, k, SIZE, HIDDEN, ROW, BLOCK_K, PACKED, VENDOR, dtype
        )
        up = _multiplied(w, x, up, PACKED, VENDOR)
    if BIAS:
        bias_ptr += expert * (2 * SIZE) + out
        gate += tl.load(bias_ptr, out < SIZE, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias_ptr + SIZE, out < SIZE, other=0.0).to(tl.float32)[:, None]
    target = out_ptr + row[None, :].to(tl.int64) * SIZE + out[:, None]
    kept = (row < end)[None, :] & (out < SIZE)[:, None]
    tl.store(target, gated(gate, up, LIMIT, ALPHA).to(dtype), kept)


@triton.jit
def _gate_up(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    order_ptr,
    starts_ptr,
    out_ptr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    VENDOR: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """SwiGLU of gate and up of a tile; grid (⌈SIZE / BLOCK_N⌉, row blocks).

    x [tokens, HIDDEN], weight [EXPERTS, 2 · SIZE, HIDDEN] (gate rows first) and its scales, bias
    [EXPERTS, 2 · SIZE], order and starts as in `grouping` → out [pairs by expert, SIZE]. What is
    left of an expert's rows is a tile of SHORT of them, if they fit.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    expert, first, end = _find(starts_ptr, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_M)
    if expert >= EXPERTS:
        return
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SHORT < BLOCK_M and end - first <= SHORT:
        _gate_up_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, order_ptr, out_ptr, expert, first, end, out,
            TOP_K, HIDDEN, SIZE, SHORT, BLOCK_N, BLOCK_K, PACKED, BIAS, LIMIT, ALPHA, VENDOR,
        )  # fmt: skip
    else:
        _gate_up_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, order_ptr, out_ptr, expert, first, end, out,
            TOP_K, HIDDEN, SIZE, BLOCK_M, BLOCK_N, BLOCK_K, PACKED, BIAS, LIMIT, ALPHA, VENDOR,
        )  # fmt: skip


@triton.jit
def _down_rows(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    shares_ptr,
    order_ptr,
    out_ptr,
    expert,
    first,
    end,
    out,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Columns `out` of BLOCK_M rows of `expert` from `first` on, as `_down`."""
    row = first + tl.arange(0, BLOCK_M)
    dtype = x_ptr.dtype.element_ty
    source = x_ptr + row[:, None].to(tl.int64) * SIZE
    weight_ptr += expert.to(tl.int64) * (HIDDEN * SIZE // (8 if PACKED else 1))
    scale_ptr += expert.to(tl.int64) * (HIDDEN * ((SIZE + 127) // 128))
    mixed = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, SIZE, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        kept = (row < end)[:, None]
        if SIZE % BLOCK_K != 0:
            kept = kept & (at < SIZE)[None, :]
        x = tl.load(source + at[None, :], kept, other=0.0).T
        w = _weights(
            weight_ptr, scale_ptr, out, k, HIDDEN, SIZE, HIDDEN, BLOCK_K, PACKED, VENDOR, dtype
        )
        mixed = _multiplied(w, x, mixed, PACKED, VENDOR)
    if BIAS:
        bias = tl.load(bias_ptr + expert * HIDDEN + out, out < HIDDEN, other=0.0)
        mixed += bias.to(tl.float32)[:, None]
    pair = tl.load(order_ptr + row, row < end, other=0)
    mixed *= tl.load(shares_ptr + pair, row < end, other=0.0)[None, :]
    target = out_ptr + pair[None, :].to(tl.int64) * HIDDEN + out[:, None]
    tl.store(target, mixed.to(dtype), (row < end)[None, :] & (out < HIDDEN)[:, None])


@triton.jit
def _down(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    shares_ptr,
    order_ptr,
    starts_ptr,
    out_ptr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    VENDOR: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Down projection of a tile, times the router's weights; grid (⌈HIDDEN / BLOCK_N⌉, row blocks).

    x [pairs by expert, SIZE], weight [EXPERTS, HIDDEN, SIZE] and its scales, bias
    [EXPERTS, HIDDEN], shares float32 [pairs] → out [pairs, HIDDEN], pairs in their first order.
    Rows as in `_gate_up`.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    expert, first, end = _find(starts_ptr, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_M)
    if expert >= EXPERTS:
        return
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SHORT < BLOCK_M and end - first <= SHORT:
        _down_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, shares_ptr, order_ptr, out_ptr, expert, first,
            end, out, HIDDEN, SIZE, SHORT, BLOCK_N, BLOCK_K, PACKED, BIAS, VENDOR,
        )  # fmt: skip
    else:
        _down_rows(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, shares_ptr, order_ptr, out_ptr, expert, first,
            end, out, HIDDEN, SIZE, BLOCK_M, BLOCK_N, BLOCK_K, PACKED, BIAS, VENDOR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first"])
def _sum(
    pairs_ptr,
    chosen_ptr,
    out_ptr,
    first,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """pairs [tokens · TOP_K, HIDDEN] → out [tokens, HIDDEN], always summed in the same order.

    Only pairs whose expert, from chosen [tokens · TOP_K], is one of EXPERTS from `first` on.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        own = tl.load(chosen_ptr + pair) - first
        kept = (at < HIDDEN) & (own >= 0) & (own < EXPERTS)
        total += tl.load(pairs_ptr + pair * HIDDEN + at, kept, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + at, total.to(out_ptr.dtype.element_ty), at < HIDDEN)


def row_blocks(pairs: int, experts: int, height: int) -> int:
    """The most blocks of `height` rows that `pairs` rows of some of the experts can fill."""
    used = min(pairs, experts)
    return used + (pairs - used) // height


def _tile(target: Target, dtype: torch.dtype, mean_rows: float, packed: bool) -> Tile:
    """The first tile that holds the rows an expert gets on average."""
    choices = target.tiles.mxfp4 if packed else target.tiles.experts
    fitting = [tile for tile in choices if tile.m >= mean_rows]
    return for_dtype(fitting[0] if fitting else choices[-1], dtype)


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    activation: Activation,
    shard: ExpertShard,
    target: Target,
) -> torch.Tensor:
    """As `Backend.experts`, for weights in the forms that `mxfp4.Stack` has."""
    gate_up, down = experts.gate_up, experts.down
    gate_up_bias, down_bias = experts.gate_up_bias, experts.down_bias
    x, chosen = x.contiguous(), chosen.contiguous()
    (tokens, hidden), (_, top_k) = x.shape, chosen.shape
    if not tokens:
        return torch.empty_like(x)
    count, size, packed = experts.count, experts.size, down.is_packed
    pairs = tokens * top_k
    tile = _tile(target, x.dtype, pairs / (count * shard.size), packed)
    first = shard.rank * count
    order, starts = group_by_expert(chosen, first, count, target)
    shared: dict[str, Any] = {
        "EXPERTS": count,
        "BLOCK_E": triton.next_power_of_2(count),
        "HIDDEN": hidden,
        "SIZE": size,
        "BLOCK_M": tile.m,
        "SHORT": min(target.tiles.short or tile.m, tile.m),
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "VENDOR": target.vendor,
        **tile.options,
        **target.launch_options,
    }
    blocks = row_blocks(pairs, count, tile.m)
    inner = x.new_empty(pairs, size)
    _gate_up[(triton.cdiv(size, tile.n), blocks)](
        x,
        gate_up.values,
        gate_up.scales,
        x if gate_up_bias is None else gate_up_bias,
        order,
        starts,
        inner,
        TOP_K=top_k,
        PACKED=gate_up.is_packed,
        BIAS=gate_up_bias is not None,
        LIMIT=activation.limit,
        ALPHA=activation.alpha,
        **shared,
    )
    parts = x.new_empty(pairs, hidden)
    # A stage has half of what gate and up have: in twice as many as much is on its way.
    _down[(triton.cdiv(hidden, tile.n), blocks)](
        inner,
        down.values,
        down.scales,
        x if down_bias is None else down_bias,
        weights.contiguous(),
        order,
        starts,
        parts,
        PACKED=packed,
        BIAS=down_bias is not None,
        **{**shared, "num_stages": 2 * (tile.stages - 1) if packed else tile.stages},
    )
    out = torch.empty_like(x)
    block = min(1024, triton.next_power_of_2(hidden))
    _sum[(tokens, triton.cdiv(hidden, block))](
        parts,
        chosen,
        out,
        first,
        TOP_K=top_k,
        EXPERTS=count,
        HIDDEN=hidden,
        BLOCK=block,
        num_warps=4,
        **target.launch_options,
    )
    return out
