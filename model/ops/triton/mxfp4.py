"""MXFP4 unpacked in registers (OCP Microscaling Formats 1.0: E2M1 values, E8M0 scales)."""

import triton
import triton.language as tl


@triton.jit
def _value(code):
    """Codes 0 to 15, int32 → their values, float32.

    E2M1's exponent and mantissa, moved to where float32 has them, make a number 2^126 times too
    small: subnormal for the codes 0 and 1, as they are.
    """
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def unpack(pairs, scales, VENDOR: tl.constexpr, DTYPE: tl.constexpr):
    """pairs uint8 [rows, in / 2] (low nibble first), scales uint8 [rows, in / 32] → [rows, in].

    VENDOR as in `tiles.vendor`.
    """
    ROWS: tl.constexpr = pairs.shape[0]
    GROUPS: tl.constexpr = scales.shape[1]
    # E8M0 is the exponent of a float32, but for 0: 2^-127 is subnormal there.
    exponent = scales.to(tl.int32)
    bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
    scale = bits.to(tl.float32, bitcast=True)[:, :, None]
    code = pairs.to(tl.int32).reshape(ROWS, GROUPS, 16)
    low = (_value(code & 15) * scale).to(DTYPE)
    high = (_value(code >> 4) * scale).to(DTYPE)
    return tl.join(low, high).reshape(ROWS, GROUPS * 32)
