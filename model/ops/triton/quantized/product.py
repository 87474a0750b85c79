"""Products of rows with weights of 4 and 8 bits, of one weight or of the chosen experts of a stack.

Outputs are the rows of a tile and tokens its columns: at decode few tokens fill the short side of
the matrix instruction, which takes unpacked weights from registers. Scales multiply the sums, one
for each group of inputs, so that integers and e4m3 are multiplied exactly.
"""

import triton
import triton.language as tl

from model.ops.triton.kernels.expert_rows import find_row_block, load_rows
from model.ops.triton.mxfp4 import multiply
from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.quantized.unpack import unpack


@triton.jit
def _load_vector(source, at, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    if SIZE % BLOCK == 0:
        return tl.load(source + at).to(tl.float32)
    else:  # after an `if` without `else` the compiler would see both returns
        return tl.load(source + at, at < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _load_scales(source, out, OUT: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr):
    """Load scales of a group; those of integers are float16 times 2^12, so that none is small."""
    scales = _load_vector(source, out, OUT, BLOCK_N)
    return scales if KIND == "fp8" or KIND == "fp8x8" else scales * (1.0 / 4096)


@triton.jit
def _load_weights(
    codes_ptr,
    zero_ptr,
    out,
    k,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    RUN: tl.constexpr,
    VENDOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Load rows `out` [BLOCK_N] and columns [k, k + BLOCK_K) of a weight, without their scales."""
    PER_WORD: tl.constexpr = 8 if KIND == "int4" else (4 if RUN else 1)
    WORDS: tl.constexpr = IN // PER_WORD
    at = k // PER_WORD + tl.arange(0, BLOCK_K // PER_WORD)
    source = codes_ptr + out[:, None].to(tl.int64) * WORDS + at[None, :]
    if OUT % BLOCK_N == 0 and IN % BLOCK_K == 0:
        codes = tl.load(source)
    elif RUN:
        codes = tl.load(source, (out < OUT)[:, None] & (at < WORDS)[None, :], other=0)
    else:
        codes = tl.load(source, (out < OUT)[:, None] & (at < WORDS)[None, :], other=0.0)
    if RUN:
        if ZEROS:
            zeros = _load_vector(zero_ptr + k // GROUP * OUT, out, OUT, BLOCK_N)
        else:
            zeros = tl.full((BLOCK_N,), 8.0 if KIND == "int4" else 128.0, tl.float32)
        return unpack(codes, zeros, KIND, RUN, VENDOR, DTYPE)
    else:
        return codes


@triton.jit
def _sums(
    source,
    x_scale_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    out,
    inside,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    X_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    RUN: tl.constexpr,
    VENDOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return outputs `out` of the rows that start at source [BLOCK_M, 1], float32 [N, M].

    x_scale_ptr [BLOCK_M]: where the scales of these rows start; one scale after every step of
    BLOCK_K inputs if the weight has groups, which are multiples of BLOCK_K.
    """
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, IN, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        x = load_rows(source, at, inside, IN, BLOCK_M, BLOCK_K)
        w = _load_weights(
            codes_ptr, zero_ptr, out, k, OUT, IN, GROUP, BLOCK_N, BLOCK_K, KIND, ZEROS, RUN,
            VENDOR, DTYPE,
        )  # fmt: skip
        if GROUP < IN:
            scale = _load_scales(scale_ptr + k // GROUP * OUT, out, OUT, BLOCK_N, KIND)
            part = tl.dot(w, x, input_precision="ieee") * scale[:, None]
            if X_SCALES > 1:
                part *= tl.load(x_scale_ptr + k // GROUP)[None, :]
            total += part
        elif RUN:
            total = multiply(w, x, total, RUN, VENDOR)
        else:  # matrix instructions add e4m3 with fewer bits than float32, so steps are added here
            total += tl.dot(w, x)
    if GROUP == IN:
        total *= _load_scales(scale_ptr, out, OUT, BLOCK_N, KIND)[:, None]
    if X_SCALES == 1:
        total *= tl.load(x_scale_ptr)[None, :]
    return total


@triton.jit(do_not_specialize=["rows"])
def quantized_product(
    x_ptr,
    x_scale_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    order_ptr,
    expert_starts_ptr,
    router_weights_ptr,
    out_ptr,
    rows,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    X_SCALES: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    RUN: tl.constexpr,
    BIAS: tl.constexpr,
    VENDOR: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Multiply BLOCK_M rows with BLOCK_N weight rows; grid (row blocks, ⌈OUT / BLOCK_N⌉).

    x [rows, IN], x_scale float32 [rows, X_SCALES] (0: none), a weight [OUT, IN] as in
    `QuantizedWeight`, bias [OUT] → out [rows, OUT]. EXPERTS > 0: a stack of such weights and
    biases; order and expert_starts from `sort_by_expert`. With TOP_K > 0 x has a row for each
    token, and out one for each sorted pair; otherwise x has one for each sorted pair, and out one
    for each pair before sorting, times the router's weights float32 [pairs].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    PER_WORD: tl.constexpr = 8 if KIND == "int4" else (4 if RUN else 1)
    dtype = x_ptr.dtype.element_ty
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if EXPERTS:
        expert, first, end = find_row_block(
            expert_starts_ptr, tl.program_id(0), EXPERTS, BLOCK_E, BLOCK_M, 0
        )
        if expert >= EXPERTS:
            return
        codes_ptr += expert.to(tl.int64) * (OUT * IN // PER_WORD)
        scale_ptr += expert.to(tl.int64) * (OUT * (IN // GROUP))
        zero_ptr += expert.to(tl.int64) * (OUT * (IN // GROUP))
        bias_ptr += expert * OUT
    else:
        first, end = tl.program_id(0) * BLOCK_M, rows
    row = first + tl.arange(0, BLOCK_M)
    inside = row < end
    at = tl.minimum(row, end - 1)
    if EXPERTS and TOP_K:
        at = tl.load(order_ptr + at) // TOP_K
    total = _sums(
        x_ptr + at[:, None].to(tl.int64) * IN, x_scale_ptr + at * X_SCALES, codes_ptr, scale_ptr,
        zero_ptr, out, inside, OUT, IN, GROUP, X_SCALES, BLOCK_M, BLOCK_N, BLOCK_K, KIND, ZEROS,
        RUN, VENDOR, dtype,
    )  # fmt: skip
    if BIAS:
        total += _load_vector(bias_ptr, out, OUT, BLOCK_N)[:, None]
    if EXPERTS and TOP_K == 0:
        row = tl.load(order_ptr + row, inside, other=0)
        total *= tl.load(router_weights_ptr + row, inside, other=0.0)[None, :]
    target = out_ptr + row[None, :].to(tl.int64) * OUT + out[:, None]
    kept = inside[None, :] & (out < OUT)[:, None]
    tl.store(target, total.to(out_ptr.dtype.element_ty), kept)


@triton.jit
def quantize_rows(
    x_ptr,
    static_ptr,
    out_ptr,
    scale_ptr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    STATIC: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Round a row to e4m3 with a scale for each GROUP of values; grid (rows,).

    x [rows, SIZE] → out [rows, SIZE], scale float32 [rows, SIZE / GROUP]. STATIC: the scale is
    static float32 [1]; values beyond its range saturate. BLOCK: at least SIZE.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    LIMIT: tl.constexpr = 240.0 if out_ptr.dtype.element_ty.is_fp8e4b8() else 448.0
    # The columns of a group of the whole row may exceed it.
    WIDTH: tl.constexpr = BLOCK if GROUP == SIZE else GROUP
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK // WIDTH)
    at = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    x = tl.load(x_ptr + row * SIZE + at, at < SIZE, other=0.0).to(tl.float32)
    if STATIC:
        scale = tl.load(static_ptr) + tl.zeros((BLOCK // WIDTH,), tl.float32)
    else:
        scale = tl.max(tl.abs(x), 1) / LIMIT
    # A subnormal scale would have an infinite inverse.
    factor = 1.0 / tl.where(scale < 1.0e-37, 1.0, scale)
    x = tl.minimum(tl.maximum(x * factor[:, None], -LIMIT), LIMIT)
    tl.store(out_ptr + row * SIZE + at, x.to(out_ptr.dtype.element_ty), at < SIZE)
    groups: tl.constexpr = SIZE // GROUP
    tl.store(scale_ptr + row * groups + group, scale, group < groups)
