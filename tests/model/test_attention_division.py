"""Attention of the native kernels does not depend on how a batch is divided, to the last bit."""

from collections.abc import Iterator

import pytest
import torch

from model.ops.cpu.backend import CpuBackend
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.kv_values import rounded
from model.ops.specs import AttentionSpec
from tests.model.emulator import native_level
from tests.model.ops_helpers import cpu_backend, rand, reference

BLOCK = 8


def batch_of(
    lengths: list[tuple[int, int]], tables: list[list[int]]
) -> tuple[ForwardBatch, GroupTables]:
    """Sequences (query length, context length) with their blocks."""
    starts = torch.tensor([0, *(query for query, _ in lengths)]).cumsum(0)
    table = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
    for row, blocks in enumerate(tables):
        table[row, : len(blocks)] = torch.tensor(blocks)
    empty = torch.zeros(int(starts[-1]), dtype=torch.int64)
    contexts = [context for _, context in lengths]
    batch = ForwardBatch(
        empty, empty, [query for query, _ in lengths], contexts, 0, (), empty, starts.int(),
        torch.tensor(contexts, dtype=torch.int32),
    )  # fmt: skip
    return batch, GroupTables(table, empty)


def shared_tables(contexts: list[int], shared: list[int], window: int | None) -> list[list[int]]:
    """Tables of sequences whose first `shared` positions are in the blocks of sequence 0.

    Blocks behind the window are freed, as for a query of one token.
    """
    tables: list[list[int]] = []
    unused = iter(range(1, 10_000))
    for context, common in zip(contexts, shared, strict=True):
        kept = tables[0][: common // BLOCK] if tables else []
        blocks = kept + [next(unused) for _ in range(-(-context // BLOCK) - len(kept))]
        tables.append(blocks)
    if window is None:
        return tables
    freed = [max(0, context - 4 - window) // BLOCK for context in contexts]
    return [[0] * count + blocks[count:] for count, blocks in zip(freed, tables, strict=True)]


@pytest.fixture(params=["avx2", "vnni", "avx512", "amx"])
def backend(request: pytest.FixtureRequest) -> Iterator[CpuBackend]:
    """The backend with the kernels of each instruction set; they take caches of several dtypes."""
    with native_level(request.param):
        yield cpu_backend(torch.bfloat16, "int8")


def attend_alone(
    backend: CpuBackend,
    query: torch.Tensor,
    kv: torch.Tensor,
    lengths: list[tuple[int, int]],
    tables: list[list[int]],
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The same attention, for each sequence alone."""
    parts = query.split([count for count, _ in lengths])
    return torch.cat(
        [
            backend.attention(part.clone(), kv, *batch_of([length], [table]), spec, sinks)
            for part, length, table in zip(parts, lengths, tables, strict=True)
        ]
    )


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [(7, 1), (4, 2)])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_shared_blocks_give_the_same_bits_as_reading_them_for_each(
    kv_dtype: torch.dtype,
    heads: tuple[int, int],
    window: int | None,
    sinks: bool,
    backend: CpuBackend,
) -> None:
    """Prefixes of different lengths, some within others, and some that end within a span."""
    contexts = [300, 200, 211, 230, 290, 130, 77, 300, 240]
    shared = [0, 192, 200, 64, 0, 128, 72, 290, 8]
    lengths = [(1 + i % 3 * (window is None), context) for i, context in enumerate(contexts)]
    tables = shared_tables(contexts, shared, window)
    query = rand(sum(count for count, _ in lengths), heads[0], 64, dtype=torch.bfloat16)
    kv = rounded(rand(2, 400, BLOCK, heads[1], 64, seed=1), kv_dtype)
    column = rand(heads[0], seed=2, dtype=torch.bfloat16) if sinks else None
    spec = AttentionSpec(64**-0.5, window)
    batch, group = batch_of(lengths, tables)
    together = backend.attention(query, kv, batch, group, spec, column)
    alone = attend_alone(backend, query, kv, lengths, tables, spec, column)
    assert torch.equal(together, alone)
    expected = reference(torch.bfloat16).attention(query, kv, batch, group, spec, column)
    torch.testing.assert_close(together, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("window", [None, 1500])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_threads_and_chunks_of_a_long_context_do_not_change_a_bit(
    kv_dtype: torch.dtype, window: int | None, backend: CpuBackend
) -> None:
    """One token, a few, and a prompt that ends with them; more chunks than one, and shared ones."""
    contexts, query_lens = [2600, 2600, 1030, 2600], [1, 3, 1, 100]
    tables = shared_tables(contexts, [0, 2600, 1000, 2600], None)
    kv = rounded(rand(2, 500, BLOCK, 1, 32, seed=1), kv_dtype)
    lengths = list(zip(query_lens, contexts, strict=True))
    tokens = rand(100, 3, 32, dtype=torch.bfloat16)
    query = torch.cat([tokens[-1:], tokens[-3:], tokens[:1], tokens])
    spec = AttentionSpec(32**-0.5, window)
    batch, group = batch_of(lengths, tables)
    usual, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            found.append(backend.attention(query, kv, batch, group, spec))
            found.append(attend_alone(backend, query, kv, lengths, tables, spec, None))
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(found[0][:1], found[0][-1:])  # decoded and computed as part of a prompt
    assert torch.equal(found[0][1:4], found[0][-3:])
    expected = reference(torch.bfloat16).attention(query, kv, batch, group, spec)
    torch.testing.assert_close(found[0], expected, rtol=3e-2, atol=3e-2)
