"""Codes of 4 and 8 bits unpacked in registers to the dtype of a product.

A part of a word, two codes in its halves, becomes two numbers at once: an integer below 128 is the
mantissa of a bfloat16 between 128 and 256, and the bits of an e4m3 number are those of a bfloat16
that is 2^120 times too small.
"""

import triton
import triton.language as tl

# $0 = $1 · $2 + $3, of each of the two bfloat16 in a register.
_FMA_PAIR = tl.constexpr("fma.rn.bf16x2 $0, $1, $2, $3;")
_CODES = tl.constexpr(0x00FF00FF)
_NIBBLES = tl.constexpr(0x000F000F)
_MAGIC = tl.constexpr(0x43004300)  # two bfloat16: 128 and 128, whose last bits count ones
_ONES = tl.constexpr(0x3F803F80)
_SIGN = tl.constexpr(0x00800080)
_SIZE = tl.constexpr(0x007F007F)
_UP = tl.constexpr(0x7B807B80)  # 2^120 and 2^120
_MINUS_ZEROS = tl.constexpr(-0x7FFF8000)  # 0x80008000


@triton.jit
def _pairs(words, KIND: tl.constexpr, RUN: tl.constexpr):
    """Cut words [rows, words] into codes in both halves of int32 [rows, groups of 32, 16]."""
    ROWS: tl.constexpr = words.shape[0]
    GROUPS: tl.constexpr = words.shape[1] // (4 if KIND == "int4" else 8)
    if KIND == "int4":
        word = words.reshape(ROWS, GROUPS, 4)
        even = tl.join(word & _NIBBLES, (word >> 8) & _NIBBLES)
        pair = tl.join(even, tl.join((word >> 4) & _NIBBLES, (word >> 12) & _NIBBLES))
    else:
        word = words.reshape(ROWS, GROUPS, 4, 2)
        pair = tl.join(word & _CODES, (word >> 8) & _CODES)
    # [rows, groups, lanes, 2, 2]: the last two are a lane's pairs in their order.
    if RUN == 2:
        pair = pair.permute(0, 1, 3, 4, 2)
    if RUN == 4:
        pair = pair.permute(0, 1, 3, 2, 4)
    return pair.reshape(ROWS, GROUPS, 16)


@triton.jit
def unpack(
    words, zeros, KIND: tl.constexpr, RUN: tl.constexpr, VENDOR: tl.constexpr, DTYPE: tl.constexpr
):
    """words int32 [rows, words], zeros float32 [rows] → codes minus zeros [rows, in] in DTYPE.

    KIND: that of the weight, "int4", "int8" or "fp8", which has no zeros. Differences of integers
    are exact in DTYPE. VENDOR: as in `mxfp4.unpack`.
    """
    pair = _pairs(words, KIND, RUN)
    ROWS: tl.constexpr = pair.shape[0]
    IN: tl.constexpr = pair.shape[1] * 32
    if KIND == "fp8":
        pair = (pair & _SIGN) << 8 | (pair & _SIZE) << 4
    if VENDOR == "nvidia" and tl.bfloat16 == DTYPE and KIND != "int8":
        if KIND == "fp8":
            pair = tl.inline_asm_elementwise(
                _FMA_PAIR, "=r,r,r,r", [pair, _UP, _MINUS_ZEROS],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            # -(128 + zero) is exact for whole zeros of up to 127.
            minus = (-128.0 - zeros).to(tl.bfloat16).to(tl.int16, bitcast=True)
            minus = (minus.to(tl.int32) & 0xFFFF) * 0x10001
            pair = tl.inline_asm_elementwise(
                _FMA_PAIR, "=r,r,r,r", [pair | _MAGIC, _ONES, minus[:, None, None]],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        low = (pair & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        if KIND == "fp8":
            low = (pair << 16).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
            high = (pair & -0x10000).to(tl.float32, bitcast=True) * 1.329227995784916e36
        else:
            low = (pair & 0xFFFF).to(tl.float32) - zeros[:, None, None]
            high = (pair >> 16).to(tl.float32) - zeros[:, None, None]
        if tl.bfloat16 == DTYPE:  # exact, so cut off; rounding takes many instructions on AMD
            low = (low.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(DTYPE, bitcast=True)
            high = (high.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        else:
            low, high = low.to(DTYPE), high.to(DTYPE)
    return tl.join(low, high).reshape(ROWS, IN)
