"""MXFP4 unpacked in registers (OCP Microscaling Formats 1.0: E2M1 values, E8M0 scales)."""

import triton
import triton.language as tl

# Two bfloat16 a register: each times 2^126, then times its scale; -0.0 is added.
_SCALE_PAIR = tl.constexpr("""
{
    .reg .b32 raise, none, value;
    mov.b32 raise, 0x7E807E80;
    mov.b32 none, 0x80008000;
    fma.rn.bf16x2 value, $1, raise, none;
    fma.rn.bf16x2 $0, value, $2, none;
}
""")


@triton.jit
def unpack(pairs, scales, VENDOR: tl.constexpr, DTYPE: tl.constexpr):
    """pairs uint8 [rows, in / 2] (low nibble first), scales uint8 [rows, in / 32] → [rows, in].

    A pair of codes is spread over the halves of a word, sign, exponent and mantissa where
    bfloat16 has them. That makes numbers 2^126 times too small, subnormal for the codes 0 and 1,
    as they are in E2M1; multiplied by 2^126 they are exact. Scales are powers of two, whose bits
    are the exponent, but for 2^-127, which is subnormal. VENDOR as in `tiles.vendor`: NVIDIA's
    GPUs multiply both halves at once.
    """
    ROWS: tl.constexpr = pairs.shape[0]
    GROUPS: tl.constexpr = scales.shape[1]
    spread = pairs.to(tl.int32).reshape(ROWS, GROUPS, 16) * 0x1001
    word = ((spread << 12) & -0x7FFF8000) | ((spread << 6) & 0x01C001C0)
    exponent = scales.to(tl.int32)
    scale = tl.where(exponent == 0, 0x40, exponent << 7)[:, :, None]
    if VENDOR == "nvidia" and tl.bfloat16 == DTYPE:
        both = scale * 0x10001
        word = tl.inline_asm_elementwise(
            _SCALE_PAIR, "=r,r,r", [word, both], dtype=tl.int32, is_pure=True, pack=1
        )
        low = (word & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        factor = (scale << 16).to(tl.float32, bitcast=True)
        low = (word << 16).to(tl.float32, bitcast=True) * 8.507059173023462e37
        high = (word & -0x10000).to(tl.float32, bitcast=True) * 8.507059173023462e37
        low, high = (low * factor).to(DTYPE), (high * factor).to(DTYPE)
    return tl.join(low, high).reshape(ROWS, GROUPS * 32)
