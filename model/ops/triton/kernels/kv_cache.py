"""Rounding to the dtype of the KV cache, when keys and values are written."""

import triton
import triton.language as tl


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """Round float32 values to a dtype; fp8 saturates, as in `kv_values.py`, and NaN stays NaN."""
    if dtype.is_fp8():
        LIMIT: tl.constexpr = 240.0 if dtype.is_fp8e4b8() else 448.0
        values = tl.where(values > LIMIT, LIMIT, values)
        values = tl.where(values < -LIMIT, -LIMIT, values)
    return values.to(dtype)
