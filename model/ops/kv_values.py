"""Keys and values as the KV cache stores them, rounded to its dtype.

Floating-point numbers are rounded to nearest; e4m3 saturates, and has no scale, since keys and
values are far from its limits (448; 240 in the form of gfx942). int8 has a scale for each vector,
a token's key or value of one head: the largest magnitude / 127, as float32 behind its values, so
that a block holds all that belongs to it. The error of a value is at most 1/16 of it in e4m3, and
1/254 of the largest of its vector in int8.
"""

import torch

from model.ops.specs import KV_SCALE_BYTES

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
_INT8_MAX = 127


def vector_width(dtype: torch.dtype, head_dim: int) -> int:
    """Return how many elements of the cache's dtype a vector [head_dim] takes."""
    return head_dim + KV_SCALE_BYTES if dtype == torch.int8 else head_dim


def write_kv(kv: torch.Tensor, slot_mapping: torch.Tensor, *vectors: torch.Tensor) -> None:
    """Store key and value [tokens, kv_heads, head_dim] in kv [2, blocks, block_size, kv_heads, …].

    Or a latent that is both in kv [1, …]. The last dimension of kv is `vector_width`.
    """
    flat = _indexable(kv).flatten(1, 2)
    for part, given in zip(flat, vectors, strict=True):
        part.index_copy_(0, slot_mapping, _indexable(rounded(given, kv.dtype)))


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return vectors [..., head_dim] as a cache of this dtype stores them [..., vector_width]."""
    if dtype in FP8:
        limit = torch.finfo(dtype).max  # torch rounds larger values to NaN
        return values.float().clamp(-limit, limit).to(dtype)
    if dtype != torch.int8:
        return values.to(dtype)
    values = values.float()
    scale = values.abs().amax(-1, keepdim=True) / _INT8_MAX
    steps = (values / scale.masked_fill(scale == 0, 1)).round().to(torch.int8)
    return torch.cat((steps, scale.view(torch.int8)), dim=-1)


def read_kv(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return vectors as a cache stores them [..., vector_width] as values [..., head_dim]."""
    if stored.dtype != torch.int8:
        return stored.to(dtype)
    steps, scale = stored.split((stored.shape[-1] - KV_SCALE_BYTES, KV_SCALE_BYTES), dim=-1)
    return (steps * scale.contiguous().view(torch.float32)).to(dtype)


def select_kv(stored: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Return the vectors [slots, …] of a cache's keys or values [all slots, …]."""
    return _indexable(stored).index_select(0, slots).view(stored.dtype)


def _indexable(values: torch.Tensor) -> torch.Tensor:
    """Return the same memory in a dtype for which torch has indexing on every device."""
    return values.view(torch.uint8) if values.dtype in FP8 else values
