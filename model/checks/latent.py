"""Cases of latent attention before and after attention itself."""

from collections.abc import Callable, Iterator

import torch

from model.checks.case import Case, Tensors
from model.checks.inputs import Inputs, Weights
from model.latent_attention import LatentAttention
from model.ops.backend import Backend
from model.ops.specs import RopeArgs


def _row_counts(inputs: Inputs) -> tuple[int, ...]:
    return 1, 3, inputs.size.rows, inputs.size.tokens


def head_linear_cases(layer: LatentAttention, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the product from latents to each head's values.

    The heads of the input are longer in memory than what is multiplied.
    """
    declared, item = layer.expand, inputs.dtype.itemsize
    weights = Weights(declared, inputs)
    for rows in _row_counts(inputs):
        x = inputs.normal(rows, declared.heads, declared.inputs + 8)

        def prepare(backend: Backend, x: torch.Tensor = x) -> Callable[[], Tensors]:
            own, linear = x.to(backend.dtype)[..., : declared.inputs], weights.on(backend)
            return lambda: (backend.head_linear(own, linear),)

        per_row = declared.heads * (declared.inputs + declared.outputs)
        moved = weights.bytes(item) + rows * per_row * item
        flops = 2 * rows * declared.heads * declared.inputs * declared.outputs
        yield Case("head_linear", f"{rows} rows", prepare, moved, flops, rows == 1)


def latent_query_cases(
    layer: LatentAttention, rotary_dim: int, block_size: int, inputs: Inputs
) -> Iterator[Case]:
    """Yield the cases of queries of latents, with the write of latents."""
    heads, norm = layer.heads, inputs.norm(layer.latent_norm)
    weights, item = Weights(layer.absorb, inputs), inputs.dtype.itemsize
    width = layer.absorb.inputs + rotary_dim
    for rows in _row_counts(inputs):
        query = inputs.normal(rows, heads.heads, width)
        latent = inputs.normal(rows, heads.head_dim)
        cos_sin, blocks = inputs.angles(rows, rotary_dim), -(-rows // block_size) + 2
        slots = inputs.order(blocks * block_size)[:rows]
        shape = (1, blocks, block_size, 1, heads.head_dim)

        def prepare(
            backend: Backend,
            query: torch.Tensor = query,
            latent: torch.Tensor = latent,
            cos_sin: torch.Tensor = cos_sin,
            slots: torch.Tensor = slots,
            shape: tuple[int, ...] = shape,
        ) -> Callable[[], Tensors]:
            kv = backend.empty_cache(shape)
            kv.copy_(torch.full_like(kv, 0.5, dtype=torch.float32))
            own, compressed = query.to(backend.dtype), latent.to(backend.dtype)
            rope, absorb = RopeArgs(heads, cos_sin, kv, slots), weights.on(backend)
            return lambda: (backend.latent_query(own, compressed, norm, absorb, rope), kv)

        moved = weights.bytes(item) + 2 * (query.numel() + latent.numel()) * item
        flops = 2 * rows * heads.heads * layer.absorb.inputs * layer.absorb.outputs
        yield Case("latent_query", f"{rows} rows", prepare, moved, flops, rows == 1)
