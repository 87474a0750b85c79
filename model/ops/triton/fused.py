"""Norm with QKV, norm with gate, up and SwiGLU, norm with a whole MLP: fewer launches at decode.

For few rows, where a launch costs more than an activation read again by every program. The row's
scale is a factor of the whole product, so a program need not know it before it multiplies. Up to
how many rows this wins is in `Tiles` (`fused_qkv` and the like): above, the functions here return
None, and the decoder goes in steps.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from model.ops.triton.norm import gated
from model.ops.triton.tiles import for_dtype, processors, tiles

_SLICE = 32  # of the MLP's inner size that one program computes


@triton.jit
def _summed(x_ptr, delta_ptr, sum_ptr, rows, at, SIZE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Columns `at` of x + delta [rows, SIZE], rounded as they are stored, by the first program."""
    row = tl.arange(0, BLOCK_M)
    place = row[:, None] * SIZE + at[None, :]
    inside = (row < rows)[:, None] & (at < SIZE)[None, :]
    x = tl.load(x_ptr + place, inside, other=0.0)
    delta = tl.load(delta_ptr + place, inside, other=0.0)
    x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
    if tl.program_id(0) == 0:
        tl.store(sum_ptr + place, x, inside)
    return x.to(tl.float32)


@triton.jit
def _weight(
    weight_ptr,
    out,
    at,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows `out` [ROWS] and columns `at` [COLUMNS] of a weight [OUT, IN]."""
    source = weight_ptr + out[:, None].to(tl.int64) * IN + at[None, :]
    if OUT % ROWS == 0 and IN % COLUMNS == 0:
        return tl.load(source)
    else:  # not after it: the compiler would see both returns
        return tl.load(source, (out < OUT)[:, None] & (at < IN)[None, :], other=0.0)


@triton.jit(do_not_specialize=["rows"])
def _norm_linear(
    x_ptr,
    delta_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    out_ptr,
    rows,
    eps,
    SIZE: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
):
    """x, delta, sum [rows, SIZE], norm [SIZE], weight [OUT, SIZE] → out [rows, OUT].

    GATED: weight [2 · OUT, SIZE] has gate rows, then up rows, and out is their plain SwiGLU.
    """
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    dtype = x_ptr.dtype.element_ty
    squares = tl.zeros((BLOCK_M,), tl.float32)
    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, SIZE, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        x = _summed(x_ptr, delta_ptr, sum_ptr, rows, at, SIZE, BLOCK_M)
        squares += tl.sum(x * x, 1)
        norm = tl.load(norm_ptr + at, at < SIZE, other=0.0).to(tl.float32)
        w = _weight(weight_ptr, out, at, OUT, SIZE, BLOCK_N, BLOCK_K)
        h = (x * norm[None, :]).to(dtype).T
        product = tl.dot(w, h, product, input_precision="ieee")
        if GATED:
            w = _weight(weight_ptr + OUT * SIZE, out, at, OUT, SIZE, BLOCK_N, BLOCK_K)
            up = tl.dot(w, h, up, input_precision="ieee")
    scale = tl.rsqrt(squares / SIZE + eps)[None, :]
    product *= scale
    if BIAS:
        product += tl.load(bias_ptr + out, out < OUT, other=0.0).to(tl.float32)[:, None]
    if GATED:
        up *= scale
        if BIAS:
            up += tl.load(bias_ptr + OUT + out, out < OUT, other=0.0).to(tl.float32)[:, None]
        product = gated(product, up, None, 1.0)
    kept = (row < rows)[None, :] & (out < OUT)[:, None]
    tl.store(out_ptr + row[None, :] * OUT + out[:, None], product.to(dtype), kept)


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
):
    """A slice of the inner size, from the residual stream to its part of the output.

    x, delta, sum [rows, SIZE], norm [SIZE], gate_up [2 · INNER, SIZE], down [SIZE, INNER] →
    parts float32 [slices, rows, SIZE]; grid (slices,).
    """
    inner = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    row = tl.arange(0, BLOCK_M)
    dtype = x_ptr.dtype.element_ty
    squares = tl.zeros((BLOCK_M,), tl.float32)
    gate = tl.zeros((BLOCK_I, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_I, BLOCK_M), tl.float32)
    for k in tl.range(0, SIZE, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        x = _summed(x_ptr, delta_ptr, sum_ptr, rows, at, SIZE, BLOCK_M)
        squares += tl.sum(x * x, 1)
        norm = tl.load(norm_ptr + at, at < SIZE, other=0.0).to(tl.float32)
        h = (x * norm[None, :]).to(dtype).T
        w = _weight(gate_up_ptr, inner, at, INNER, SIZE, BLOCK_I, BLOCK_K)
        gate = tl.dot(w, h, gate, input_precision="ieee")
        w = _weight(gate_up_ptr + INNER * SIZE, inner, at, INNER, SIZE, BLOCK_I, BLOCK_K)
        up = tl.dot(w, h, up, input_precision="ieee")
    scale = tl.rsqrt(squares / SIZE + eps)[None, :]
    hidden = gated(gate * scale, up * scale, None, 1.0).to(dtype)
    for n in tl.range(0, SIZE, BLOCK_N):
        out = n + tl.arange(0, BLOCK_N)
        w = _weight(down_ptr, out, inner, SIZE, INNER, BLOCK_N, BLOCK_I)
        part = tl.dot(w, hidden, input_precision="ieee")
        place = (tl.program_id(0) * rows + row)[None, :] * SIZE + out[:, None]
        tl.store(parts_ptr + place, part, (row < rows)[None, :] & (out < SIZE)[:, None])


@triton.jit(do_not_specialize=["slices", "stride"])
def _sum_parts(parts_ptr, out_ptr, slices, stride, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """parts float32 [slices, stride] → out [stride], always summed in the same order."""
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
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As ops.norm_qkv."""
    if delta is None or not 0 < len(x) <= tiles(x.device).fused_qkv:
        return None
    return _linear(x, delta, norm, eps, weight, bias)


def norm_mlp(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    gate_up: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As ops.norm_mlp: one kernel without biases, or all but the down projection in one."""
    if delta is None or not len(x):
        return None
    own = tiles(x.device)
    if len(x) <= own.fused_mlp and gate_up_bias is None and down_bias is None:
        return _mlp(x, delta, norm, eps, gate_up, down)
    if len(x) > own.fused_gate_up:
        return None
    summed, hidden = _linear(x, delta, norm, eps, gate_up, gate_up_bias, is_gated=True)
    return summed, F.linear(hidden, down, down_bias)


def _linear(
    x: torch.Tensor,
    delta: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    is_gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta [rows, size], norm [size], weight [out, size] → (x + delta, its norm · weight).

    is_gated: weight has gates and ups, and in place of them is their plain SwiGLU [rows, out / 2].
    """
    rows, size = x.shape
    tile = for_dtype(tiles(x.device).fused, x.dtype)
    count = len(weight) // 2 if is_gated else len(weight)
    summed, out = torch.empty_like(x), x.new_empty(rows, count)
    # Gates come with as many ups; and too few programs would not keep enough of a small weight on
    # its way.
    narrow = is_gated or count < tile.n * processors(x.device)
    block = max(16, tile.n // 2) if narrow else tile.n
    _norm_linear[(triton.cdiv(count, block),)](
        x,
        delta,
        norm,
        weight,
        weight if bias is None else bias,
        summed,
        out,
        rows,
        eps,
        SIZE=size,
        OUT=count,
        BLOCK_M=max(16, triton.next_power_of_2(rows)),
        BLOCK_N=block,
        BLOCK_K=tile.k,
        BIAS=bias is not None,
        GATED=is_gated,
        **tile.options,
    )
    return summed, out


def _mlp(
    x: torch.Tensor,
    delta: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta [rows, size], gate_up [2 · inner, size], down [size, inner] → (x + delta, its MLP).

    The MLP is plain SwiGLU without biases, over the norm of the sum.
    """
    rows, size = x.shape
    tile = for_dtype(tiles(x.device).fused, x.dtype)
    inner = down.shape[1]
    slices = triton.cdiv(inner, _SLICE)
    summed, out = torch.empty_like(x), torch.empty_like(x)
    parts = x.new_empty(slices, rows, size, dtype=torch.float32)
    _norm_mlp[(slices,)](
        x,
        delta,
        norm,
        gate_up,
        down,
        summed,
        parts,
        rows,
        eps,
        SIZE=size,
        INNER=inner,
        BLOCK_M=max(16, triton.next_power_of_2(rows)),
        BLOCK_I=_SLICE,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        **tile.options,
    )
    block = 128
    _sum_parts[(triton.cdiv(rows * size, block),)](
        parts, out, slices, rows * size, BLOCK_S=16, BLOCK=block, num_warps=4
    )
    return summed, out
