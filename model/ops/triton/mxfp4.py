"""MXFP4 unpacked in registers (OCP Microscaling Formats 1.0: E2M1 values, E8M0 scales).

Of 32 values a lane of a matrix instruction holds eight: runs of neighbours at equal distances. They
are packed in one word, in which each pair's bits are laid out as in bfloat16 except for a shift. So
a lane loads exactly the values that it needs, as words: single bytes can neither be loaded
asynchronously, while the previous tile is multiplied, nor in few instructions. The length of a run
depends on the instruction (`Target.mxfp4_run`); with another one the results are the same, but
values are exchanged between lanes through shared memory.

NVIDIA's GPUs copy words to shared memory while they multiply, and lanes read theirs there. AMD's
load them into registers, so there words are stored in the order of a wave's lanes
(`Target.mxfp4_rows`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
_COLUMNS = tl.constexpr(128)  # whose words are stored together, for several rows
_MAX_SCALE = 128  # exponent of 2, the largest scale that can be multiplied by 2^126


@dataclass(frozen=True)
class ExpertWeights:
    """Weights [experts, out, in] in the form that kernels read: dense, or MXFP4 packed in words.

    Dense weights have no scales; `scales` is then the values once more. Packed: the 16 bytes that
    share a scale are 4 words of 4 parts. Word c has the runs c, c + 4 and so on of run / 2 bytes.
    The low nibble of a part is in the lower half of the word, the high nibble in the upper half.
    Sign, exponent and mantissa of a nibble in part i are at bits 15, 8, 7 and 6 minus 3 · i; those
    of the last part take the free bits 14, 11, 10 and 13.

    A row's words have the order of its columns. Where the words of `Target.mxfp4_rows` rows are
    stored together, they have the order (128 columns, c, row, 32 columns), and zeros fill the last
    128 columns.
    """

    values: torch.Tensor  # packed: int32 [experts, out, in / 8] or [experts, out / rows, words]
    scales: torch.Tensor  # packed: int32 [experts, ⌈in / 128⌉, out], each with four scales
    run: int = 0  # neighbouring values of a word: 2, 4 or 8; 0: dense

    @property
    def is_packed(self) -> bool:
        """Whether the values are MXFP4 in words."""
        return self.run > 0

    @property
    def row(self) -> int:
        """Elements of `values` for each output."""
        outputs = self.scales.shape[2] if self.is_packed else self.values.shape[1]
        return self.values[0].numel() // outputs


def dense_weights(weights: torch.Tensor) -> ExpertWeights:
    """Wrap dense weights [experts, out, in]."""
    return ExpertWeights(weights, weights)


def words_shape(outputs: int, inputs: int, rows: int) -> tuple[int, int]:
    """Return the shape of the words of a weight [outputs, inputs], of `rows` rows together."""
    whole = inputs if rows == 1 else triton.cdiv(inputs, _COLUMNS.value) * _COLUMNS.value
    return outputs // rows, whole // 8 * rows


def pack(weights: Mxfp4, dtype: torch.dtype, run: int, rows: int) -> ExpertWeights:
    """Pack weights in words with runs of this length, the words of `rows` rows together.

    They become dense in dtype if a scale is above 2, or if the rows that are stored together do not
    divide gate or up (half of the outputs). Neither occurs in trained models.
    """
    count, outputs, inputs = weights.shape
    is_divided = rows > 1 and outputs % (2 * rows) > 0
    if int(weights.scales.max()) > _MAX_SCALE or is_divided:
        return dense_weights(weights.dense(dtype))
    device = weights.device
    values = torch.empty(
        count, *words_shape(outputs, inputs, rows), dtype=torch.int32, device=device
    )
    columns = triton.cdiv(inputs, 32 * _SCALES)
    scales = torch.zeros(count, columns * _SCALES, outputs, dtype=torch.uint8, device=device)
    for expert in range(count):  # one at a time, because packing takes four times their memory
        values[expert] = _in_order(_words(weights.blocks[expert], run), rows)
        scales[expert, : inputs // 32] = weights.scales[expert].T
    words = scales.unflatten(1, (-1, _SCALES)).transpose(2, 3).contiguous().view(torch.int32)
    return ExpertWeights(values, words.squeeze(-1), run)


def _words(blocks: torch.Tensor, run: int) -> torch.Tensor:
    """Return the words [outputs, in / 8] of blocks uint8 [outputs, in / 32, 16]."""
    runs = blocks.flatten(1).unflatten(1, (-1, 8 // run, 4, run // 2))
    pairs = runs.transpose(2, 3).flatten(3).int()  # [outputs, groups, words, parts]
    pairs = (pairs & 15) | (pairs & 0xF0) << 12
    sign, low = (pairs & 0x80008) << 12, (pairs & 0x70007) << 6
    parts = sign | low
    last = sign >> 1 & 0x40004000 | (pairs & 0x60006) << 9 | (pairs & 0x10001) << 13
    first, second, third, _ = parts.unbind(3)
    word = first | second >> 3 & 0x10381038 | third >> 6 & 0x2070207
    return (word | last[..., 3]).flatten(1)


def _in_order(words: torch.Tensor, rows: int) -> torch.Tensor:
    """Put words [outputs, in / 8] in the order in which `rows` rows together are stored."""
    if rows == 1:
        return words
    groups = _COLUMNS.value // 32
    whole = F.pad(words, (0, -words.shape[1] % (4 * groups)))
    tiles = whole.unflatten(1, (-1, groups, 4)).unflatten(0, (-1, rows))
    return tiles.permute(0, 2, 4, 1, 3).flatten(1)


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
def _load_words(
    weight_ptr,
    first_out,
    k,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """Load the words [BLOCK_N, BLOCK_K / 8] for `load_weights`."""
    if VENDOR == "amd":  # a lane loads the words of its row and of its c
        GROUPS: tl.constexpr = BLOCK_K // 32
        TILE: tl.constexpr = 16 * (_COLUMNS // 8)
        block = first_out // 16 + tl.arange(0, BLOCK_N // 16)
        lane = tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :]
        group = tl.arange(0, GROUPS)
        if GROUPS < 4:
            group += k // 32 % 4
        place = (lane[:, :, None] * 4 + group[None, None, :])[None, :, :, :]
        place += block[:, None, None, None].to(tl.int64) * (ROW * 16)
        mask = (block < OUT // 16)[:, None, None, None]
        words = tl.load(weight_ptr + (place + k // _COLUMNS * TILE), mask, other=0)
        return words.permute(0, 2, 3, 1).reshape(BLOCK_N, BLOCK_K // 8)
    else:  # after an `if` without `else` the compiler would see both returns
        out, at = first_out + tl.arange(0, BLOCK_N), k // 8 + tl.arange(0, BLOCK_K // 8)
        mask = (out < OUT)[:, None]
        if IN % BLOCK_K:
            mask = mask & (at < IN // 8)[None, :]
        return tl.load(weight_ptr + out[:, None].to(tl.int64) * ROW + at[None, :], mask, other=0)


@triton.jit
def load_weights(
    weight_ptr,
    scale_ptr,
    first_out,
    k,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
    VENDOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Load BLOCK_N rows from first_out on and BLOCK_K columns from k on of a weight [OUT, IN].

    RUN, ROW: `ExpertWeights.run` and `ExpertWeights.row`. The words with scales of the same columns
    are contiguous, SCALE_ROW of them; BLOCK_K is 32, 64 or 128, so that a row needs one of them.
    """
    out = first_out + tl.arange(0, BLOCK_N)
    if RUN:
        words = _load_words(weight_ptr, first_out, k, OUT, IN, ROW, BLOCK_N, BLOCK_K, VENDOR)
        scales = tl.load(scale_ptr + k // 128 * SCALE_ROW + out, out < OUT, other=0)
        return unpack(words, scales, k // 32 % 4, RUN, VENDOR, DTYPE)
    else:  # after an `if` without `else` the compiler would see both returns
        at = k + tl.arange(0, BLOCK_K)
        mask = (out < OUT)[:, None]
        if IN % BLOCK_K:
            mask = mask & (at < IN)[None, :]
        return tl.load(weight_ptr + out[:, None].to(tl.int64) * ROW + at[None, :], mask, other=0.0)


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
