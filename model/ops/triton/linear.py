"""Launches of linear layers for few rows, with the norm before them and the step after them."""

from dataclasses import replace

import torch
import torch.nn.functional as F
import triton

from model.ops.specs import HeadLinear, Linear, Norm, RopeArgs
from model.ops.triton.kernels.linear import fused_linear
from model.ops.triton.norm import delta_parts
from model.ops.triton.tiles import Target, Tile, for_dtype

_ROW = Tile(1, 16, 256, 4, 3)  # used as `Tiles.one_row` where each row has its own programs
HALF = 16  # weight rows of each half of a pair, the minimum of a matrix instruction


def linear(x: torch.Tensor, linear: Linear, target: Target) -> torch.Tensor:
    """As `Backend.linear`: torch's, except for a single row if `Tiles.one_row` is set."""
    if not is_one_row(x, target):
        return F.linear(x, linear.weight, linear.bias)
    return norm_linear(x, None, None, linear, target)[1]


def float32_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """x [rows, in] · weight [outputs, in]ᵀ → out float32 [rows, outputs]."""
    if weight.is_cuda and weight.dtype != torch.float32:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
    else:  # of Triton's interpreter, on the CPU
        torch.mm(x.float(), weight.float().t(), out=out)


def is_one_row(x: torch.Tensor, target: Target) -> bool:
    """Whether x [rows, size] is a single row and there is a kernel for one."""
    return len(x) == 1 and target.tiles.one_row is not None


def norm_linear(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    norm: Norm | None,
    linear: Linear,
    target: Target,
    is_gated: bool = False,
    rope: RopeArgs | None = None,
    out: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, size], delta of `Backend.add_rms_norm` → (x + delta, `linear` of its norm).

    The result is [rows, out]. Without a norm, x must be a single row, which is multiplied itself.
    is_gated: the linear layer gives gate and up, and their plain SwiGLU [rows, out / 2] is
    returned. rope: it gives QKV, which is rotated and written as in `rotate_and_write`, and the
    query is returned. out: takes the result, in any dtype; without it the result has the weight's.
    normed [rows, size]: the norm is written to it, and each row has its own programs.
    """
    rows, size = x.shape
    weight, bias = linear.weight, linear.bias
    count = len(weight) // 2 if is_gated else len(weight)
    summed = x if delta is None else torch.empty_like(x)
    cos_sin = kv = slot_mapping = x
    heads = kv_heads = dim = 0
    if rope is not None:
        layer, cos_sin, kv, slot_mapping = rope[:4]
        heads, kv_heads, dim = layer.heads, layer.kv_heads, layer.head_dim
    if out is None:
        out = weight.new_empty((rows, heads, dim) if heads else (rows, count))
    one_row = target.tiles.one_row if rows == 1 else None
    if normed is not None:
        one_row = target.tiles.one_row or _ROW
    tile = _tile(x, weight.dtype, target, count, is_gated or heads > 0, one_row)
    grid = (heads + 2 * kv_heads) * (dim // 2 // tile.n) if heads else triton.cdiv(count, tile.n)
    fused_linear[(grid, rows if tile.m == 1 else 1)](
        x.contiguous(),
        x if delta is None else delta.contiguous(),
        x if norm is None else norm.weight,
        weight,
        weight if bias is None else bias,
        cos_sin,
        slot_mapping,
        summed,
        out,
        out if normed is None else normed,
        kv,
        kv.stride(0) if heads else 0,
        rows,
        0.0 if norm is None else norm.eps,
        SIZE=size,
        OUT=count,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        NORM=norm is not None,
        PARTS=delta_parts(delta),
        SLICE=0 if normed is None else triton.next_power_of_2(triton.cdiv(size, grid)),
        BIAS=bias is not None,
        GATED=is_gated,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK_SIZE=kv.shape[2] if heads else 0,
        BLOCK_STRIDE=kv.stride(1) if heads else 0,
        STAGES=tile.stages,
        **tile.options,
        **target.launch_options,
    )
    return summed, out


def tile_of(rows: int, dtype: torch.dtype, target: Target) -> Tile:
    """Return a tile with room for all rows, at most 64; dtype: of the weight."""
    tile = for_dtype(target.tiles.fused, dtype)
    height = max(16, triton.next_power_of_2(rows))
    # The rows are float32: many of them in steps of k would take too many registers.
    depth = tile.k // 2 if height > 16 else tile.k
    return replace(tile, m=height, k=depth, warps=tile.warps * height // 16)


def _tile(
    x: torch.Tensor,
    dtype: torch.dtype,
    target: Target,
    count: int,
    is_paired: bool,
    one_row: Tile | None,
) -> Tile:
    """Return the tile of a product with `count` weight rows, or pairs of them.

    For a small weight each program takes fewer rows, so that all of the device loads it. Programs
    of pairs take half as many pairs. one_row: the tile if a program multiplies a single row.
    """
    (rows, size), pair = x.shape, 2 if is_paired else 1
    if one_row is not None:
        tile = one_row
        most = pair * rows * count // (2 * target.processors)
        block = min(tile.n, max(2, 1 << most.bit_length() >> 1))
        columns = tile.n * tile.k // block  # the same number of weights in each step
        return replace(tile, n=block // pair, k=min(columns, triton.next_power_of_2(size)))
    tile = tile_of(rows, dtype, target)
    is_narrow = is_paired or count < tile.n * target.processors
    return replace(tile, n=HALF if is_narrow else tile.n)


def head_linear(x: torch.Tensor, linear: HeadLinear) -> torch.Tensor:
    """As `Backend.head_linear`."""
    out = x.new_empty(*x.shape[:2], linear.outputs)
    multiply_heads(x, linear, out)
    return out


def multiply_heads(x: torch.Tensor, linear: HeadLinear, out: torch.Tensor) -> None:
    """Fill out [tokens, heads, outputs] with the products of x [tokens, heads, inputs]."""
    torch.bmm(x.transpose(0, 1), linear.weight.transpose(1, 2), out=out.transpose(0, 1))
