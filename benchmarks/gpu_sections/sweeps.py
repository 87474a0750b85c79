"""Other tiles than those in use, for attention, experts and single rows.

The fastest ones belong in TILES of model/ops/triton/tiles.py. A tile that is too large for this GPU
has no row.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_sections.compile_ahead import compile_together
from benchmarks.gpu_sections.inputs import fused, kernels, paged_batch, rand, random_layer
from benchmarks.gpu_sections.kernels import ATTENTION_SHAPES, experts_call, random_experts
from benchmarks.gpu_sections.measure import Limits, Row, note, seconds_of
from benchmarks.gpu_sections.switches import layer_products
from model.ops.backend import Backend
from model.ops.specs import AttentionSpec

if TYPE_CHECKING:
    from model.ops.triton.tiles import Tile

_MOST_SUMS = 128  # of a thread, float32

_MARGIN = 1.5  # times the longest compilation so far: what the next one may take

_Calls = Mapping["Tile", Callable[[], Any]]
_Sweep = tuple[str, _Calls, "Tile"]


def sweep(title: str, calls: _Calls, own: "Tile", end: float) -> Iterator[Row]:
    """Time a call with each tile, the one in use first, then say which one is the fastest.

    Tiles are compiled together, as many as there are cores. The last ones are left out if another
    group would probably not be done at `end`, as `time.time()`.
    """
    spent, longest = dict["Tile", float](), 0.0
    left = [tile for tile in calls if tile != own]
    group = [own]
    while group:
        started = time.time()
        compile_together(calls[tile] for tile in group)
        for tile in group:
            # Jobs use only `own`. Others may be too large for the GPU or the compiler.
            with suppress(*(() if tile == own else (Exception,))):
                spent[tile] = seconds_of(calls[tile])
                yield Row(f"{title}, {tile}", spent[tile] * 1e6, "us")
        longest = max(longest, time.time() - started)
        count = 0 if time.time() + _MARGIN * longest > end else os.cpu_count() or 1
        group, left = left[:count], left[count:]
    best = min(spent, key=lambda tile: spent[tile])
    yield Row(f"{title}: fastest {best}", spent[own] / spent[best], "times as fast as the one used")
    if left:
        yield note(f"{title}: {len(left)} of {len(calls)} tiles were left out for lack of time")


def sweeps(found: Sequence[_Sweep], until: float) -> Iterator[Row]:
    """Make each sweep (title, calls, tile in use); they share the time until the section's end."""
    first_row = 0.0  # seconds until the tile in use was timed, at most
    for number, (title, calls, own) in enumerate(found):
        now = time.time()
        if now + _MARGIN * first_row > until:
            yield note(f"{title}: left out for lack of time")
            continue
        rows = sweep(title, calls, own, now + (until - now) / (len(found) - number))
        yield next(rows)
        first_row = max(first_row, time.time() - now)
        yield from rows


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
    own, found = kernels().target.tiles.decode, list[_Sweep]()
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
        found.append((title, calls, own))
    yield from sweeps(found, limits.until)


def sweep_prefill(limits: Limits) -> Iterator[Row]:
    """Sweep the tiles of attention of chunks."""
    found = list[_Sweep]()
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
        found.append((title, calls, own))
    yield from sweeps(found, limits.until)


def sweep_experts(limits: Limits) -> Iterator[Row]:
    """Sweep the tiles of MXFP4 experts for few and for many rows, for each product alone."""
    experts, tiles, found = random_experts(packed=True), kernels().target.tiles, list[_Sweep]()
    for field in (each.name for each in fields(tiles) if each.name.startswith("mxfp4")):
        own = getattr(tiles, field)
        for tokens, at, rows in ((1, 0, (16,)), (64, 0, (16,)), (1024, -1, (64, 128))):
            calls = {
                tile: experts_call(with_tile(field, (tile,)), experts, tokens)[0]
                for tile in _tiles(own[at], rows, (32, 64, 128), (2, 4, 8), own[at].k)
            }
            found.append((f"MXFP4 experts, {tokens} tokens, {field}", calls, own[at]))
    yield from sweeps(found, limits.until)


def sweep_one_row(limits: Limits) -> Iterator[Row]:
    """Sweep the tiles of products of one row, in the linear layers that follow norms."""
    own = kernels().target.tiles.one_row
    if own is None:
        return
    found = list[_Sweep]()
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
        found.append((f"{name}, one row", calls, own))
    yield from sweeps(found, limits.until)
