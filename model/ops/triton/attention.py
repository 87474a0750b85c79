"""Launches of attention over paged KV, for single tokens and for chunks of tokens."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.specs import AttentionSpec
from model.ops.triton.kernels.attention import combine_splits, decode_attention, prefill_attention
from model.ops.triton.tiles import Target, Tile, for_dtype

_MAX_SPLITS = 32
_MIN_TILES = 4  # KV tiles of a window in each split, since splits need a second launch


@dataclass(frozen=True)
class _Call:
    """The arguments of one attention operation, and the shapes that its launches share."""

    query: torch.Tensor  # [tokens, heads, head_dim], contiguous
    kv: torch.Tensor  # [2, blocks, block_size, kv_heads, head_dim]
    batch: ForwardBatch
    block_table: torch.Tensor  # int32 [sequences, blocks]
    spec: AttentionSpec
    sinks: torch.Tensor | None  # [heads]
    target: Target

    @property
    def sinks_or_any(self) -> torch.Tensor:
        """The sinks, or a tensor that takes their place where there are none."""
        return self.query if self.sinks is None else self.sinks

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants of the kernels that read keys and values."""
        _, heads, dim = self.query.shape
        _, _, block_size, kv_heads, _ = self.kv.shape
        return {
            "SCALE": self.spec.scale,
            "WINDOW": self.spec.window,
            "KV_HEADS": kv_heads,
            "GROUP": heads // kv_heads,
            "DIM": dim,
            "BLOCK_D": max(16, triton.next_power_of_2(dim)),
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
) -> torch.Tensor:
    """As `Backend.attention`; a sequence of length 0, which only pads a batch, gives zeros."""
    call = _Call(query.contiguous(), kv, batch, group.block_table, spec, sinks, target)
    out = torch.empty_like(call.query)
    if batch.num_single:
        _attend_single_tokens(call, out)
    if batch.context_lens.shape[0] > batch.num_single:
        _attend_chunks(call, out)
    return out


def splits_of(rows: int, kv_heads: int, window: int | None, tile: Tile, processors: int) -> int:
    """Return into how many parts the KV of each token is split: a power of 2.

    As many as keep the device busy. The context lengths do not matter, so that a step with few
    short rows needs no kernel that was not compiled for the captured steps.
    """
    most = min(_MAX_SPLITS, 2 * processors // (rows * kv_heads))
    if window is not None:
        most = min(most, triton.cdiv(window, _MIN_TILES * tile.n))
    return 1 << max(0, most.bit_length() - 1)


def _attend_single_tokens(call: _Call, out: torch.Tensor) -> None:
    query, kv, block_table, target = call.query, call.kv, call.block_table, call.target
    constants, rows = call.constants, call.batch.num_single
    _, heads, dim = query.shape
    kv_heads, group = constants["KV_HEADS"], constants["GROUP"]
    tile = for_dtype(target.tiles.decode, query.dtype)
    splits = splits_of(rows, kv_heads, call.spec.window, tile, target.processors)
    mixed = stats = out
    if splits > 1:
        mixed = query.new_empty(rows, heads, splits, dim, dtype=torch.float32)
        stats = query.new_empty(2, rows, heads, splits, dtype=torch.float32)
    decode_attention[(kv_heads, rows, splits)](
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
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_N=tile.n,
        SPLIT=splits > 1,
        **constants,
        **tile.options,
        **target.launch_options,
    )
    if splits > 1:
        combine_splits[(heads, rows)](
            mixed,
            stats,
            call.sinks_or_any,
            out,
            splits,
            HEADS=heads,
            DIM=dim,
            BLOCK_D=constants["BLOCK_D"],
            BLOCK_S=_MAX_SPLITS,
            SINKS=constants["SINKS"],
            num_warps=2,
            **target.launch_options,
        )


def _attend_chunks(call: _Call, out: torch.Tensor) -> None:
    query, kv, block_table, target = call.query, call.kv, call.block_table, call.target
    constants, batch = call.constants, call.batch
    sequences, singles = batch.context_lens.shape[0], batch.num_single
    kv_heads, group, dim = constants["KV_HEADS"], constants["GROUP"], constants["DIM"]
    tile = target.tiles.prefill if dim <= 64 else target.tiles.prefill_wide
    tile = for_dtype(tile, query.dtype)
    height = max(tile.m, triton.next_power_of_2(group))
    blocks = (query.shape[0] - singles) // (height // group) + sequences - singles
    prefill_attention[(kv_heads, blocks)](
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
