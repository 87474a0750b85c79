"""MXFP4 unpacked in registers (OCP Microscaling Formats 1.0: E2M1 values, E8M0 scales).

Of 32 values a lane of a matrix instruction holds eight: runs of neighbours at equal distances. They
are packed in one word, in which each pair's bits are laid out as in bfloat16 except for a shift. So
a lane loads exactly the values that it needs, as words: single bytes can neither be loaded
asynchronously, while the previous tile is multiplied, nor in few instructions. The length of a run
depends on the instruction (`Target.mxfp4_run`); with another one the results are the same, but
values are exchanged between lanes through shared memory.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from model.ops.mxfp4 import Mxfp4

# Multiplies each of the two bfloat16 in a register by its factor; -0.0 is added.
_SCALE_PAIR = tl.constexpr("""
{
    .reg .b32 none;
    mov.b32 none, 0x80008000;
    fma.rn.bf16x2 $0, $1, $2, none;
}
""")
_PAIR = tl.constexpr(-0x7E3F7E40)  # 0x81C081C0: sign, two bits of exponent and one of mantissa
_SCALES = 4  # in a word
_MAX_SCALE = 128  # exponent of 2, the largest scale that can be multiplied by 2^126


@dataclass(frozen=True)
class ExpertWeights:
    """Weights [experts, out, in] in the form that kernels read: dense, or MXFP4 packed in words.

    Dense weights have no scales; `scales` is then the values once more. Packed: the 16 bytes that
    share a scale are 4 words of 4 parts. Word c has the runs c, c + 4 and so on of run / 2 bytes.
    The low nibble of a part is in the lower half of the word, the high nibble in the upper half.
    Sign, exponent and mantissa of a nibble in part i are at bits 15, 8, 7 and 6 minus 3 · i; those
    of the last part take the free bits 14, 11, 10 and 13.
    """

    values: torch.Tensor  # packed: int32 [experts, out, in / 8]
    scales: torch.Tensor  # packed: int32 [experts, ⌈in / 128⌉, out], each with four scales
    run: int = 0  # neighbouring values of a word: 2, 4 or 8; 0: dense

    @property
    def is_packed(self) -> bool:
        """Whether the values are MXFP4 in words."""
        return self.run > 0


def dense_weights(weights: torch.Tensor) -> ExpertWeights:
    """Wrap dense weights [experts, out, in]."""
    return ExpertWeights(weights, weights)


def pack(weights: Mxfp4, dtype: torch.dtype, run: int) -> ExpertWeights:
    """Pack weights in words with runs of this length; dense in dtype if a scale is above 2.

    The scales of trained models are far below that.
    """
    if int(weights.scales.max()) > _MAX_SCALE:
        return dense_weights(weights.dense(dtype))
    count, outputs, inputs = weights.shape
    device = weights.device
    values = torch.empty(count, outputs, inputs // 8, dtype=torch.int32, device=device)
    columns = triton.cdiv(inputs, 32 * _SCALES)
    scales = torch.zeros(count, columns * _SCALES, outputs, dtype=torch.uint8, device=device)
    for expert in range(count):  # one at a time, because packing takes four times their memory
        runs = weights.blocks[expert].flatten(1).unflatten(1, (-1, 8 // run, 4, run // 2))
        pairs = runs.transpose(2, 3).flatten(3).int()  # [outputs, groups, words, parts]
        pairs = (pairs & 15) | (pairs & 0xF0) << 12
        sign, low = (pairs & 0x80008) << 12, (pairs & 0x70007) << 6
        parts = sign | low
        last = sign >> 1 & 0x40004000 | (pairs & 0x60006) << 9 | (pairs & 0x10001) << 13
        first, second, third, _ = parts.unbind(3)
        word = first | second >> 3 & 0x10381038 | third >> 6 & 0x2070207
        values[expert] = (word | last[..., 3]).flatten(1)
        scales[expert, : inputs // 32] = weights.scales[expert].T
    words = scales.unflatten(1, (-1, _SCALES)).transpose(2, 3).contiguous().view(torch.int32)
    return ExpertWeights(values, words.squeeze(-1), run)


@triton.jit
def unpack(words, scales, first, RUN: tl.constexpr, VENDOR: tl.constexpr, DTYPE: tl.constexpr):
    """words int32 [rows, in / 8], scales int32 [rows], index of the first scale → [rows, in].

    A part of a word, shifted to its place, is two bfloat16 that are 2^126 times too small; the
    codes 0 and 1 are subnormal, as in E2M1. A scale is a power of two. Multiplied by 2^126 it is
    still representable, and the product with it is exact. VENDOR is `Target.vendor`: NVIDIA's GPUs
    multiply both halves of a register in one instruction.
    """
    ROWS: tl.constexpr = words.shape[0]
    GROUPS: tl.constexpr = words.shape[1] // 4
    if GROUPS < 4:
        scales = scales >> first * 8
    exponent = scales & 0xFF
    if GROUPS == 2:
        exponent = tl.join(exponent, (scales >> 8) & 0xFF)
    if GROUPS == 4:
        even = tl.join(exponent, (scales >> 16) & 0xFF)
        exponent = tl.join(even, tl.join((scales >> 8) & 0xFF, (scales >> 24) & 0xFF))
    scale = ((exponent.reshape(ROWS, GROUPS) + 126) << 7)[:, :, None]
    word = words.reshape(ROWS, GROUPS, 4)
    last = ((word << 1) & -0x7FFF8000) | ((word >> 3) & 0x01800180) | ((word >> 7) & 0x00400040)
    even, odd = tl.join(word & _PAIR, (word << 6) & _PAIR), tl.join((word << 3) & _PAIR, last)
    pair = tl.join(even, odd)  # [rows, groups, words, 2, 2]: the last two are a word's parts
    if RUN == 2:
        pair = pair.permute(0, 1, 3, 4, 2)
    if RUN == 4:
        pair = pair.permute(0, 1, 3, 2, 4)
    pair = pair.reshape(ROWS, GROUPS, 16)
    if VENDOR == "nvidia" and tl.bfloat16 == DTYPE:
        pair = tl.inline_asm_elementwise(
            _SCALE_PAIR, "=r,r,r", [pair, scale * 0x10001], dtype=tl.int32, is_pure=True, pack=1
        )
        low = (pair & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        factor = (scale << 16).to(tl.float32, bitcast=True)
        low = (pair << 16).to(tl.float32, bitcast=True) * factor
        high = (pair & -0x10000).to(tl.float32, bitcast=True) * factor
        if tl.bfloat16 == DTYPE:  # exact, so cut off; rounding takes many instructions on AMD
            low = (low.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(DTYPE, bitcast=True)
            high = (high.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        else:
            low, high = low.to(DTYPE), high.to(DTYPE)
    return tl.join(low, high).reshape(ROWS, GROUPS * 32)


@triton.jit
def load_weights(
    weight_ptr,
    scale_ptr,
    out,
    k,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
    VENDOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Load rows `out` [BLOCK_N] and columns [k, k + BLOCK_K) of a weight [OUT, IN].

    RUN: `ExpertWeights.run`. The words with scales of the same columns are contiguous,
    SCALE_ROW of them; BLOCK_K is 32, 64 or 128, so that a row needs one of them.
    """
    whole: tl.constexpr = IN % BLOCK_K == 0
    row = out[:, None].to(tl.int64)
    inside = (out < OUT)[:, None]
    if RUN:
        at = k // 8 + tl.arange(0, BLOCK_K // 8)
        mask = inside if whole else inside & (at < IN // 8)[None, :]
        words = tl.load(weight_ptr + row * (IN // 8) + at[None, :], mask, other=0)
        scales = tl.load(scale_ptr + k // 128 * SCALE_ROW + out, out < OUT, other=0)
        return unpack(words, scales, k // 32 % 4, RUN, VENDOR, DTYPE)
    else:  # after an `if` without `else` the compiler would see both returns
        at = k + tl.arange(0, BLOCK_K)
        mask = inside if whole else inside & (at < IN)[None, :]
        return tl.load(weight_ptr + row * IN + at[None, :], mask, other=0.0)


@triton.jit
def multiply(w, x, total, RUN: tl.constexpr, VENDOR: tl.constexpr):
    """Return total + w · x; if w was unpacked on an NVIDIA GPU, wait until it is computed.

    Hopper's matrix products are asynchronous and read w from registers, which compilers have
    overwritten with the next weights too early (triton-lang/triton#9433). They wait for the product
    where the sum is used, and an empty instruction counts as a use.
    """
    total = tl.dot(w, x, total, input_precision="ieee")
    if RUN and VENDOR == "nvidia":
        total = tl.inline_asm_elementwise(
            "// $0", "=r,0", [total], dtype=tl.float32, is_pure=True, pack=1
        )
    return total
