"""Other tiles than those in use, for attention, experts and single rows.

The fastest ones belong in TILES of model/ops/triton/tiles.py. A tile that is too large for this GPU
has no row.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_sections.compile_ahead import compile_together
from benchmarks.gpu_sections.inputs import fused, kernels, paged_batch, rand, random_layer
from benchmarks.gpu_sections.kernels import ATTENTION_SHAPES, experts_call, random_experts
from benchmarks.gpu_sections.measure import Limits, Row, seconds_of
from benchmarks.gpu_sections.switches import layer_products
from model.ops.backend import Backend
from model.ops.specs import AttentionSpec

if TYPE_CHECKING:
    from model.ops.triton.tiles import Tile

_MOST_SUMS = 128  # of a thread, float32

_Calls = Mapping["Tile", Callable[[], Any]]


def sweep(title: str, calls: _Calls, own: "Tile") -> Iterator[Row]:
    """Time a call with each tile, the one in use first, then say which one is the fastest."""
    compile_together(calls.values())
    spent = dict["Tile", float]()
    for tile in sorted(calls, key=lambda tile: tile != own):
        # Jobs use only `own`. Others may be too large for the GPU or the compiler.
        with suppress(*(() if tile == own else (Exception,))):
            spent[tile] = seconds_of(calls[tile])
            yield Row(f"{title}, {tile}", spent[tile] * 1e6, "us")
    best = min(spent, key=lambda tile: spent[tile])
    yield Row(f"{title}: fastest {best}", spent[own] / spent[best], "times as fast as the one used")


def _tiles(
    own: "Tile", rows: Iterable[int], columns: Iterable[int], warps: Iterable[int], k: int
) -> list["Tile"]:
    """Return the tile in use and every combination of these sizes, with two or more stages."""
    from model.ops.triton.tiles import Tile

    sizes = itertools.product(rows, columns, warps, (own.stages, max(2, own.stages - 2)))
    # A thread with more sums has too few registers, and the compiler takes several times as long.
    fitting = (Tile(m, n, k, w, s) for m, n, w, s in sizes if m * n <= _MOST_SUMS * 32 * w)
    return list(dict.fromkeys([own, *fitting]))


def with_tile(field: str, tile: Any) -> Backend:
    """Return the backend of this GPU with another tile (or tuple of tiles) in a field of Tiles."""
    changed: dict[str, Any] = {field: tile}
    return kernels(**changed)


def sweep_decode(limits: Limits) -> Iterator[Row]:
    """Sweep the tiles of attention of single tokens."""
    own = kernels().target.tiles.decode
    rows, context = 256, 1000
    for heads, kv_heads, dim in ATTENTION_SHAPES[:2]:
        batch, group, blocks = paged_batch([(1, context)] * rows)
        kv = rand(2, blocks, 16, kv_heads, dim, dtype=torch.bfloat16)
        query, spec = rand(rows, heads, dim, dtype=torch.bfloat16), AttentionSpec(dim**-0.5, None)
        calls = {
            tile: partial(kernels(decode=tile).attention, query, kv, batch, group, spec)
            for tile in _tiles(own, (own.m,), (32, 64, 128), (1, 2, 4), 0)
        }
        title = f"decode attention {heads}/{kv_heads} heads of {dim}, {rows} x {context}"
        yield from sweep(title, calls, own)


def sweep_prefill(limits: Limits) -> Iterator[Row]:
    """Sweep the tiles of attention of chunks."""
    for heads, kv_heads, dim, field in ((64, 8, 64, "prefill"), (32, 8, 128, "prefill_wide")):
        own, count = getattr(kernels().target.tiles, field), 4096
        batch, group, blocks = paged_batch([(count, count)])
        kv = rand(2, blocks, 16, kv_heads, dim, dtype=torch.bfloat16)
        query, spec = rand(count, heads, dim, dtype=torch.bfloat16), AttentionSpec(dim**-0.5, None)
        calls = {
            tile: partial(with_tile(field, tile).attention, query, kv, batch, group, spec)
            for tile in _tiles(own, (64, 128), (32, 64, 128), (4, 8), 0)
        }
        title = f"prefill attention {heads}/{kv_heads} heads of {dim}, {count} tokens"
        yield from sweep(title, calls, own)


def sweep_experts(limits: Limits) -> Iterator[Row]:
    """Sweep the tiles of MXFP4 experts for few and for many rows, for each product alone."""
    experts, tiles = random_experts(packed=True), kernels().target.tiles
    for field in (each.name for each in fields(tiles) if each.name.startswith("mxfp4")):
        own = getattr(tiles, field)
        for tokens, at, rows in ((1, 0, (16,)), (64, 0, (16,)), (1024, -1, (64, 128))):
            calls = {
                tile: experts_call(with_tile(field, (tile,)), experts, tokens)[0]
                for tile in _tiles(own[at], rows, (32, 64, 128), (2, 4, 8), own[at].k)
            }
            yield from sweep(f"MXFP4 experts, {tokens} tokens, {field}", calls, own[at])


def sweep_one_row(limits: Limits) -> Iterator[Row]:
    """Sweep the tiles of products of one row, in the linear layers that follow norms."""
    own = kernels().target.tiles.one_row
    if own is None:
        return
    for name in ("qwen2-0.5b", "llama-3-8b"):
        layer = random_layer(name)
        x = rand(1, layer.mlp.norm.size, dtype=torch.bfloat16)

        def products(ops: Backend, layer: Any = layer, x: Any = x) -> Callable[[], Any]:
            return layer_products(ops, layer, x)

        calls = {
            tile: products(fused(fused_qkv=1, fused_gate_up=1, one_row=tile))
            for k in (256, 512)
            for tile in _tiles(own, (1,), (8, 16, 32), (4, 8), k)
        }
        yield from sweep(f"{name}, one row", calls, own)
