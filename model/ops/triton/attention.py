"""Launches of attention over paged KV, for single tokens and for chunks of tokens."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.kv_values import FP8
from model.ops.specs import AttentionSpec
from model.ops.triton.kernels.decode_attention import decode_attention
from model.ops.triton.kernels.prefill_attention import prefill_attention
from model.ops.triton.tiles import Target, Tile, for_dtype

_MIN_TILES = 4  # KV tiles in each part, since combining parts takes time
_MAX_PARTS = 64  # of a row
_MAX_ROWS = 64  # (rows · KV heads) that each processor has if long rows are still split
_LATENT_HEADS = 16  # the most that a program computes, whose results are long
_EXTRAS = 4  # programs on each processor for the further parts of long rows


def arrival_counters(target: Target, device: torch.device) -> torch.Tensor:
    """Counters of the parts that ended, for all launches of one stream; each leaves them at 0."""
    return torch.zeros(_MAX_ROWS * target.processors, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class _Call:
    """The arguments of one attention operation, and the shapes that its launches share."""

    query: torch.Tensor  # [tokens, heads, head_dim], contiguous
    kv: torch.Tensor  # as `Backend.empty_cache` returns it, in any floating-point dtype
    batch: ForwardBatch
    block_table: torch.Tensor  # int32 [sequences, blocks]
    spec: AttentionSpec
    sinks: torch.Tensor | None  # [heads]
    target: Target
    arrivals: torch.Tensor  # see `arrival_counters`

    @property
    def sinks_or_any(self) -> torch.Tensor:
        """The sinks, or a tensor that takes their place where there are none."""
        return self.query if self.sinks is None else self.sinks

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants of the kernels that read keys and values."""
        _, heads, dim = self.query.shape
        _, _, block_size, kv_heads, _ = self.kv.shape
        tail = 0
        if self.spec.latent_dim is not None:
            # Parts of the heads take the place of KV heads, since results of all do not fit.
            tail = dim - self.spec.latent_dim
            kv_heads = heads // _largest_divisor(heads, _LATENT_HEADS)
        return {
            "SCALE": self.spec.scale,
            "SOFTCAP": self.spec.softcap,
            "WINDOW": self.spec.window,
            "KV_HEADS": kv_heads,
            "GROUP": heads // kv_heads,
            "DIM": dim,
            "TAIL": tail,
            "BLOCK_D": max(16, triton.next_power_of_2(dim - tail)),
            "BLOCK_T": max(16, triton.next_power_of_2(tail)),
            "BLOCK_SIZE": block_size,
            "SINKS": self.sinks is not None,
            "PRECISION": "ieee",
        }


def attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: ForwardBatch,
    group: GroupTables,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
    target: Target,
    arrivals: torch.Tensor,
) -> torch.Tensor:
    """As `Backend.attention`; a sequence of length 0, which only pads a batch, gives zeros."""
    call = _Call(query.contiguous(), kv, batch, group.block_table, spec, sinks, target, arrivals)
    out = query.new_empty(*query.shape[:2], spec.latent_dim or query.shape[2])
    if batch.num_single:
        _attend_single_tokens(call, out)
    if batch.context_lens.shape[0] > batch.num_single:
        _attend_chunks(call, out)
    return out


@dataclass(frozen=True)
class Splitting:
    """How the KV of single tokens is split, from the shapes of a launch alone.

    A row of at most `part_len` keys is not split. A longer one has parts of `part_len` keys, or of
    more, so that there are at most `max_parts`. So in steps of one shape a row's result does not
    depend on the other rows. The parts' results take at most 128 · processors · query heads for
    each KV head · head size · 4 bytes: 35 MB on an H200 with 8 heads of 64.
    """

    max_parts: int  # 1: no row is split
    part_len: int  # keys
    extras: int  # programs, for each KV head, that share the parts behind the first of each row

    @classmethod
    def of(
        cls, rows: int, kv_heads: int, window: int | None, tile: Tile, processors: int
    ) -> "Splitting":
        """The splitting of a step of `rows` single tokens.

        Few rows are split to use all processors. With many, only a row much longer than the others
        is worth splitting, because the step would wait for it: n times the rows have parts n times
        as long.
        """
        occupied = triton.next_power_of_2(triton.cdiv(rows * kv_heads, processors))
        part_len = _MIN_TILES * tile.n * occupied
        max_parts = min(_MAX_PARTS, 2 * _MAX_ROWS // occupied)
        if window is not None:
            max_parts = min(max_parts, triton.cdiv(window, part_len))
        if max_parts < 2:
            return cls(1, part_len, 0)
        extras = min(rows * (max_parts - 1), triton.cdiv(_EXTRAS * processors, kv_heads))
        return cls(max_parts, part_len, extras)


def _largest_divisor(count: int, limit: int) -> int:
    return next(n for n in range(min(count, limit), 0, -1) if count % n == 0)


def _attend_single_tokens(call: _Call, out: torch.Tensor) -> None:
    query, kv, block_table, target = call.query, call.kv, call.block_table, call.target
    constants, rows = call.constants, call.batch.num_single
    _, heads, dim = out.shape
    kv_heads, group = constants["KV_HEADS"], constants["GROUP"]
    tile = target.tiles.decode if dim <= 128 else target.tiles.decode_256
    if constants["TAIL"]:
        tile = target.tiles.decode_latent
    if kv.dtype in FP8:
        tile = replace(tile, warps=max(tile.warps, target.tiles.fp8_warps))
    tile = for_dtype(tile, query.dtype)
    split = Splitting.of(rows, kv_heads, call.spec.window, tile, target.processors)
    if target.vendor == "amd" and tile.warps > 1:
        # Nothing makes one wave wait for the stores of the others before it counts their part.
        split = Splitting(1, split.part_len, 0)
    mixed = stats = out
    if split.max_parts > 1:
        mixed = query.new_empty(rows, heads, split.max_parts, dim, dtype=torch.float32)
        stats = query.new_empty(rows, heads, split.max_parts, 2, dtype=torch.float32)
    decode_attention[((split.extras + rows) * kv_heads,)](
        query,
        kv,
        kv.stride(0),
        block_table,
        block_table.stride(0),
        call.batch.context_lens,
        call.sinks_or_any,
        out,
        mixed,
        stats,
        call.arrivals,
        rows,
        split.extras,
        split.max_parts,
        split.part_len,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_N=tile.n,
        BLOCK_G=triton.next_power_of_2(group),
        SPLIT=split.max_parts > 1,
        **constants,
        **tile.options,
        **target.launch_options,
    )


def _attend_chunks(call: _Call, out: torch.Tensor) -> None:
    query, kv, block_table, target = call.query, call.kv, call.block_table, call.target
    constants, batch = call.constants, call.batch
    sequences, singles = batch.context_lens.shape[0], batch.num_single
    kv_heads, group, dim = constants["KV_HEADS"], constants["GROUP"], constants["DIM"]
    tiles = target.tiles
    tile = tiles.prefill if dim <= 64 else tiles.prefill_wide if dim <= 128 else tiles.prefill_256
    if constants["TAIL"]:
        tile = tiles.prefill_latent
    if kv.dtype in FP8:
        tile = replace(tile, n=min(tile.n, tiles.fp8_keys if dim <= 64 else tiles.fp8_keys_wide))
    tile = for_dtype(tile, query.dtype)
    height = max(tile.m, triton.next_power_of_2(group))
    blocks = (query.shape[0] - singles) // (height // group) + sequences - singles
    prefill_attention[(kv_heads * blocks,)](
        query,
        kv,
        kv.stride(0),
        block_table,
        block_table.stride(0),
        batch.cu_seqlens_q,
        batch.context_lens,
        call.sinks_or_any,
        out,
        singles,
        sequences,
        BLOCK_M=height,
        BLOCK_N=tile.n,
        **constants,
        **tile.options,
        **target.launch_options,
    )
