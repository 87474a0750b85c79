"""Linear layers for few rows, in one kernel with the norm before them and the step after them.

The scale of a row's norm is a factor of the whole product, so a program can multiply before it
knows the scale. A single row is multiplied element by element as its weights arrive; more rows use
tiles of matrix instructions. Weights are prefetched while the previous kernel ends.
"""

import triton
import triton.language as tl

from model.ops.triton.kernels.kv_cache import rounded
from model.ops.triton.norm import add_delta, swiglu
from model.ops.triton.programmatic_launch import prefetch, wait_for_previous_kernel


@triton.jit
def _load_elements(source, at, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load the elements `at` [BLOCK] of a vector [SIZE], zeros beyond it."""
    if SIZE % BLOCK == 0:
        return tl.load(source + at)
    else:  # after an `if` without `else` the compiler would see both returns
        return tl.load(source + at, at < SIZE, other=0.0)


@triton.jit
def weight_tile(
    weight_ptr,
    out,
    at,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Load rows `out` [ROWS] and columns `at` [COLUMNS] of a weight [OUT, IN], zeros beyond it."""
    source = weight_ptr + out[:, None].to(tl.int64) * IN + at[None, :]
    if OUT % ROWS == 0 and IN % COLUMNS == 0:
        return tl.load(source)
    else:
        return tl.load(source, (out < OUT)[:, None] & (at < IN)[None, :], other=0.0)


@triton.jit
def _products_of_row(
    x_ptr,
    delta_ptr,
    norm_ptr,
    weight_ptr,
    sum_ptr,
    out,
    SIZE: tl.constexpr,
    OUT: tl.constexpr,
    SECOND_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `products_of_tile` for a single row; without NORM the row is not normalised."""
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for k in tl.range(0, SIZE, BLOCK_K, num_stages=STAGES):
        at = k + tl.arange(0, BLOCK_K)
        x = _load_elements(x_ptr, at, SIZE, BLOCK_K)
        x = x.to(tl.float32)
        if PARTS:
            delta = _load_elements(delta_ptr, at, SIZE, BLOCK_K).to(tl.float32)
            for part in tl.static_range(1, PARTS):
                more = _load_elements(delta_ptr + part * SIZE, at, SIZE, BLOCK_K)
                delta += more.to(tl.float32)
            x += delta
            tl.store(sum_ptr + at, x, (at < SIZE) & (tl.program_id(0) == 0))
        if NORM:
            squares += x * x
            x *= _load_elements(norm_ptr, at, SIZE, BLOCK_K)
        w = weight_tile(weight_ptr, out, at, OUT, SIZE, BLOCK_N, BLOCK_K)
        product += w.to(tl.float32) * x[None, :]
        if SECOND_ROW:
            w = weight_tile(weight_ptr + SECOND_ROW * SIZE, out, at, OUT, SIZE, BLOCK_N, BLOCK_K)
            second += w.to(tl.float32) * x[None, :]
    return tl.sum(product, 1)[:, None], tl.sum(second, 1)[:, None], tl.sum(squares[None, :], 1)


@triton.jit
def _load_sum(
    x_ptr, delta_ptr, rows, at, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, DELTA: tl.constexpr
):
    """Load columns `at` of x float32 + delta [rows, SIZE]; without DELTA, of x."""
    row = tl.arange(0, BLOCK_M)
    place = row[:, None] * SIZE + at[None, :]
    inside = (row < rows)[:, None] & (at < SIZE)[None, :]
    x = tl.load(x_ptr + place, inside, other=0.0)
    if DELTA:
        x += tl.load(delta_ptr + place, inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def products_of_tile(
    x_ptr,
    delta_ptr,
    norm_ptr,
    weight_ptr,
    sum_ptr,
    rows,
    out,
    SIZE: tl.constexpr,
    OUT: tl.constexpr,
    SECOND_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Multiply (x + delta) · norm with weight rows `out` and with those SECOND_ROW further on.

    x, sum float32, delta [rows, SIZE], norm float32 [SIZE], weight [at least OUT, SIZE] → products
    and second products float32 [BLOCK_N, BLOCK_M], and the sum of squares of each row of x + delta
    [BLOCK_M]; the caller multiplies the products by the scale that follows from it. If SECOND_ROW
    is 0 the second products are zeros. With DELTA the first program stores x + delta in sum.
    """
    dtype = weight_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_M)
    # A separate loop, because a store in the loop below would give x the layout of the store, and
    # reading x from shared memory would take eight times as long.
    if DELTA and tl.program_id(0) == 0:
        for k in range(0, SIZE, BLOCK_K):
            at = k + tl.arange(0, BLOCK_K)
            x = _load_sum(x_ptr, delta_ptr, rows, at, SIZE, BLOCK_M, DELTA)
            place = row[:, None] * SIZE + at[None, :]
            tl.store(sum_ptr + place, x, (row < rows)[:, None] & (at < SIZE)[None, :])
    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    norm = _load_elements(norm_ptr, tl.arange(0, BLOCK_K), SIZE, BLOCK_K)
    for k in tl.range(0, SIZE, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        x = _load_sum(x_ptr, delta_ptr, rows, at, SIZE, BLOCK_M, DELTA)
        # A matrix product for the same reason, of which only the diagonal is used. Rounding x to
        # the weight's dtype changes the sum of so many squares less than the rounding of h does.
        rounded = x.to(dtype)
        squares = tl.dot(rounded, rounded.T, squares, input_precision="ieee")
        h = (x * norm[None, :]).to(dtype).T
        # Loaded one step ahead, because asynchronous copies take at least 4 bytes a thread.
        norm = tl.load(norm_ptr + at + BLOCK_K, at + BLOCK_K < SIZE, other=0.0)
        w = weight_tile(weight_ptr, out, at, OUT, SIZE, BLOCK_N, BLOCK_K)
        product = tl.dot(w, h, product, input_precision="ieee")
        if SECOND_ROW:
            w = weight_tile(weight_ptr + SECOND_ROW * SIZE, out, at, OUT, SIZE, BLOCK_N, BLOCK_K)
            second = tl.dot(w, h, second, input_precision="ieee")
    squares = tl.where(row[:, None] == row[None, :], squares, 0.0)
    return product, second, tl.sum(squares, 0)


@triton.jit(do_not_specialize=["rows"])
def fused_linear(
    x_ptr,
    delta_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    cos_sin_ptr,
    slot_mapping_ptr,
    sum_ptr,
    out_ptr,
    normed_ptr,
    kv_ptr,
    value_offset: tl.int64,
    rows,
    eps,
    SIZE: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    PARTS: tl.constexpr,
    SLICE: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    STAGES: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Multiply rows with BLOCK_N weight rows, or pairs of weight rows; grid (⌈OUT / BLOCK_N⌉, 1).

    x, sum [rows, SIZE], delta [rows, PARTS, SIZE] (PARTS 0: none; more than 1 for BLOCK_M 1), norm
    [SIZE], weight [OUT, SIZE] → out [rows, OUT]. BLOCK_M 1: a program multiplies one row, and the
    second dimension of the grid is the rows. NORM: the norm of x + delta is multiplied, where x,
    sum and norm are float32; without it the row x. SLICE > 0, for BLOCK_M 1: each program also
    stores SLICE elements of the norm in normed [rows, SIZE]. GATED: weight
    [2 · OUT, SIZE] has gate rows, then up rows, and out is their plain SwiGLU. HEADS > 0: OUT is
    (HEADS + 2 · KV_HEADS) · DIM; rotated queries are stored in out [rows, HEADS, DIM], rotated keys
    and values in kv, as in `rotary`. A program then computes the same BLOCK_N columns of both
    halves of a head.
    """
    # Weight rows between the two of a pair; 0: no pairs.
    SECOND_ROW: tl.constexpr = OUT if GATED else DIM // 2
    program = tl.program_id(0)
    if HEADS > 0:
        BLOCKS: tl.constexpr = DIM // 2 // BLOCK_N
        head = program // BLOCKS
        column = program % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
        first = head * DIM + program % BLOCKS * BLOCK_N
    else:
        first = program * BLOCK_N
    out = first + tl.arange(0, BLOCK_N)
    count = tl.minimum(OUT - first, BLOCK_N)
    source = weight_ptr + first.to(tl.int64) * SIZE
    ROWS: tl.constexpr = 2 * BLOCK_N if SECOND_ROW else BLOCK_N
    prefetch(source, count, SIZE, BLOCK_N, ROWS, PROGRAMMATIC_LAUNCH)
    if SECOND_ROW:
        prefetch(source + SECOND_ROW * SIZE, count, SIZE, BLOCK_N, ROWS, PROGRAMMATIC_LAUNCH)
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    row = tl.arange(0, BLOCK_M)
    inside = (row < rows)[None, :]
    if BLOCK_M == 1:
        start = tl.program_id(1) * SIZE
        x_ptr += start
        delta_ptr += start * PARTS
        sum_ptr += start
        normed_ptr += start
        out_ptr += tl.program_id(1) * OUT
    if BIAS:  # loaded before the products, because it comes from memory rather than a cache
        bias = tl.load(bias_ptr + out, out < OUT, other=0.0)
        if SECOND_ROW:
            second_bias = tl.load(bias_ptr + SECOND_ROW + out, out < OUT, other=0.0)
    if BLOCK_M == 1:
        product, second, squares = _products_of_row(
            x_ptr, delta_ptr, norm_ptr, weight_ptr, sum_ptr, out,
            SIZE, OUT, SECOND_ROW, BLOCK_N, BLOCK_K, PARTS, NORM, STAGES,
        )  # fmt: skip
    else:
        product, second, squares = products_of_tile(
            x_ptr, delta_ptr, norm_ptr, weight_ptr, sum_ptr, rows, out,
            SIZE, OUT, SECOND_ROW, BLOCK_M, BLOCK_N, BLOCK_K, PARTS > 0,
        )  # fmt: skip
    if NORM:
        scale = tl.rsqrt(squares / SIZE + eps)
        product *= scale[None, :]
        second *= scale[None, :]
        if SLICE > 0:
            at = program * SLICE + tl.arange(0, SLICE)
            x = tl.load(x_ptr + at, at < SIZE, other=0.0)
            if PARTS:
                x = add_delta(x, delta_ptr, at, at < SIZE, SIZE, PARTS)
            x *= scale * tl.load(norm_ptr + at, at < SIZE, other=0.0)
            tl.store(normed_ptr + at, x.to(normed_ptr.dtype.element_ty), at < SIZE)
    if BIAS:
        product += bias.to(tl.float32)[:, None]
        if SECOND_ROW:
            second += second_bias.to(tl.float32)[:, None]
    dtype = out_ptr.dtype.element_ty
    if HEADS > 0:
        # Rounded as the result of a separate QKV projection would be.
        a, b = product.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        is_rotated = head < HEADS + KV_HEADS
        source = cos_sin_ptr + row[None, :] * DIM + column[:, None]
        cos = tl.load(source, inside & is_rotated, other=1.0)
        sin = tl.load(source + DIM // 2, inside & is_rotated, other=0.0)
        left, right = a * cos - b * sin, b * cos + a * sin
        if head < HEADS:
            target = out_ptr + (row[None, :] * HEADS + head) * DIM + column[:, None]
            tl.store(target, left.to(dtype), inside)
            tl.store(target + DIM // 2, right.to(dtype), inside)
        else:
            slot = tl.load(slot_mapping_ptr + row, row < rows, other=0)[None, :]
            kv_head = (head - HEADS) % KV_HEADS
            place = kv_ptr + slot // BLOCK_SIZE * BLOCK_STRIDE + column[:, None]
            place += (slot % BLOCK_SIZE * KV_HEADS + kv_head) * DIM
            place += tl.where(is_rotated, 0, value_offset)
            tl.store(place, rounded(left, kv_ptr.dtype.element_ty), inside)
            tl.store(place + DIM // 2, rounded(right, kv_ptr.dtype.element_ty), inside)
    else:
        if GATED:
            product = swiglu(product, second, None, 1.0)
        kept = inside & (out < OUT)[:, None]
        tl.store(out_ptr + row[None, :] * OUT + out[:, None], product.to(dtype), kept)
