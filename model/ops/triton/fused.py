"""Norm with QKV and rotary, with gate, up and SwiGLU, with a whole MLP: fewer launches at decode.

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
from model.ops.triton.overlap import overlap, wait_turn
from model.ops.triton.rotary import rotate_and_write
from model.ops.triton.tiles import for_dtype, processors, tiles

_SLICE = 32  # of the MLP's inner size that one program computes
_HALF = 16  # rows of weight of each half of a pair, the fewest that a matrix product takes


@triton.jit
def _summed(
    x_ptr,
    delta_ptr,
    sum_ptr,
    rows,
    at,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Columns `at` of x + delta [rows, SIZE], rounded as they are stored, by the first program.

    Without a DELTA those of x, which nobody stores.
    """
    row = tl.arange(0, BLOCK_M)
    place = row[:, None] * SIZE + at[None, :]
    inside = (row < rows)[:, None] & (at < SIZE)[None, :]
    x = tl.load(x_ptr + place, inside, other=0.0)
    if DELTA:
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
    cos_sin_ptr,
    slots_ptr,
    sum_ptr,
    out_ptr,
    kv_ptr,
    value_offset: tl.int64,
    rows,
    eps,
    SIZE: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DELTA: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """x, delta, sum [rows, SIZE], norm [SIZE], weight [OUT, SIZE] → out [rows, OUT].

    GATED: weight [2 · OUT, SIZE] has gate rows, then up rows, and out is their plain SwiGLU.
    HEADS, unless 0: OUT is (HEADS + 2 · KV_HEADS) · DIM, of which queries go rotated to out
    [rows, HEADS, DIM], and keys, rotated, and values to kv, as in `rotary`. A program then has
    the same BLOCK_N columns of both halves of a head.
    """
    wait_turn(OVERLAP)
    PAIRED: tl.constexpr = GATED or HEADS > 0
    APART: tl.constexpr = OUT if GATED else DIM // 2  # rows of weight between those of a pair
    program = tl.program_id(0)
    if HEADS > 0:
        PARTS: tl.constexpr = DIM // 2 // BLOCK_N
        head = program // PARTS
        column = program % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
        out = head * DIM + column
    else:
        out = program * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    dtype = x_ptr.dtype.element_ty
    squares = tl.zeros((BLOCK_M,), tl.float32)
    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, SIZE, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        x = _summed(x_ptr, delta_ptr, sum_ptr, rows, at, SIZE, BLOCK_M, DELTA)
        squares += tl.sum(x * x, 1)
        norm = tl.load(norm_ptr + at, at < SIZE, other=0.0).to(tl.float32)
        w = _weight(weight_ptr, out, at, OUT, SIZE, BLOCK_N, BLOCK_K)
        h = (x * norm[None, :]).to(dtype).T
        product = tl.dot(w, h, product, input_precision="ieee")
        if PAIRED:
            w = _weight(weight_ptr + APART * SIZE, out, at, OUT, SIZE, BLOCK_N, BLOCK_K)
            second = tl.dot(w, h, second, input_precision="ieee")
    scale = tl.rsqrt(squares / SIZE + eps)[None, :]
    product *= scale
    second *= scale
    if BIAS:
        product += tl.load(bias_ptr + out, out < OUT, other=0.0).to(tl.float32)[:, None]
        if PAIRED:
            bias = tl.load(bias_ptr + APART + out, out < OUT, other=0.0)
            second += bias.to(tl.float32)[:, None]
    inside = (row < rows)[None, :]
    if HEADS > 0:
        # Rounded as QKV alone would be.
        a, b = product.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        source = cos_sin_ptr + row[None, :] * DIM + column[:, None]
        turned = head < HEADS + KV_HEADS
        cos = tl.load(source, inside & turned, other=1.0)
        sin = tl.load(source + DIM // 2, inside & turned, other=0.0)
        first, second = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
        if head < HEADS:
            target = out_ptr + (row[None, :] * HEADS + head) * DIM + column[:, None]
        else:
            slot = tl.load(slots_ptr + row, row < rows, other=0)[None, :]
            kv_head = (head - HEADS) % KV_HEADS
            target = kv_ptr + (slot * KV_HEADS + kv_head) * DIM + column[:, None]
            target += tl.where(turned, 0, value_offset)
        tl.store(target, first, inside)
        tl.store(target + DIM // 2, second, inside)
    else:
        if GATED:
            product = gated(product, second, None, 1.0)
        kept = inside & (out < OUT)[:, None]
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
    OVERLAP: tl.constexpr,
):
    """A slice of the inner size, from the residual stream to its part of the output.

    x, delta, sum [rows, SIZE], norm [SIZE], gate_up [2 · INNER, SIZE], down [SIZE, INNER] →
    parts float32 [slices, rows, SIZE]; grid (slices,).
    """
    wait_turn(OVERLAP)
    inner = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    row = tl.arange(0, BLOCK_M)
    dtype = x_ptr.dtype.element_ty
    squares = tl.zeros((BLOCK_M,), tl.float32)
    gate = tl.zeros((BLOCK_I, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_I, BLOCK_M), tl.float32)
    for k in tl.range(0, SIZE, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        x = _summed(x_ptr, delta_ptr, sum_ptr, rows, at, SIZE, BLOCK_M, True)
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
def _sum_parts(
    parts_ptr,
    out_ptr,
    slices,
    stride,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """parts float32 [slices, stride] → out [stride], always summed in the same order."""
    wait_turn(OVERLAP)
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
    cos_sin: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As ops.norm_qkv: one kernel, or two where heads have norms, which take a whole head."""
    if not 0 < len(x) <= tiles(x.device).fused_qkv:
        return None
    if norms is None and kv.shape[4] // 2 % _HALF == 0:
        return _linear(x, delta, norm, eps, weight, bias, turn=(cos_sin, kv, slots, heads))
    summed, qkv = _linear(x, delta, norm, eps, weight, bias)
    qkv = qkv.unflatten(-1, (-1, kv.shape[4]))
    return summed, rotate_and_write(qkv, cos_sin, kv, slots, heads, norms, eps)


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
    delta: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    is_gated: bool = False,
    turn: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta [rows, size], norm [size], weight [out, size] → (x + delta, its norm · weight).

    is_gated: weight has gates and ups, and in place of them is their plain SwiGLU [rows, out / 2].
    turn: cos_sin, kv, slots and heads as in `rotate_and_write`, and in place of QKV is the query.
    """
    rows, size = x.shape
    tile = for_dtype(tiles(x.device).fused, x.dtype)
    count = len(weight) // 2 if is_gated else len(weight)
    summed = x if delta is None else torch.empty_like(x)
    cos_sin, kv, slots, heads = turn or (x, x, x, 0)
    kv_heads, dim = (kv.shape[3], kv.shape[4]) if heads else (0, 0)
    out = x.new_empty(rows, heads, dim) if heads else x.new_empty(rows, count)
    # Rows of weight in pairs come twice as many; and too few programs would not keep enough of a
    # small weight on its way.
    narrow = is_gated or heads or count < tile.n * processors(x.device)
    block = _HALF if narrow else tile.n
    grid = (heads + 2 * kv_heads) * (dim // 2 // block) if heads else triton.cdiv(count, block)
    _norm_linear[(grid,)](
        x.contiguous(),
        x if delta is None else delta.contiguous(),
        norm,
        weight,
        weight if bias is None else bias,
        cos_sin,
        slots,
        summed,
        out,
        kv,
        kv.stride(0) if heads else 0,
        rows,
        eps,
        SIZE=size,
        OUT=count,
        BLOCK_M=max(16, triton.next_power_of_2(rows)),
        BLOCK_N=block,
        BLOCK_K=tile.k,
        DELTA=delta is not None,
        BIAS=bias is not None,
        GATED=is_gated,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        **tile.options,
        **overlap(x.device),
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
        **overlap(x.device),
    )
    block = 128
    _sum_parts[(triton.cdiv(rows * size, block),)](
        parts,
        out,
        slices,
        rows * size,
        BLOCK_S=16,
        BLOCK=block,
        num_warps=4,
        **overlap(x.device),
    )
    return summed, out
