"""Cases of attention over paged KV, made so that a missing or misplaced mask shows."""

from collections.abc import Callable, Iterator, Sequence

import torch

from model.attention import Attention
from model.checks.case import Case, Tensors
from model.checks.inputs import Inputs
from model.latent_attention import LatentAttention
from model.ops.backend import Backend
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.kv_values import read_kv, rounded, vector_width

_SPARE_BLOCKS = 2  # that belong to no sequence
_EDGES = (15, 16, 31, 32, 63, 64, 127, 128)  # positions where tiles of keys end and begin

Length = tuple[int, int]
"""New tokens of a sequence, and its context with them."""


def attention_cases(
    layer: Attention | LatentAttention, block_size: int, inputs: Inputs
) -> Iterator[Case]:
    """Yield the cases of one kind of layer: single tokens, chunks, and both in one step."""
    window, size = layer.spec.window, inputs.size
    name = "" if window is None else f", window {window}"
    single = [1, 2, 16, 17, 63, 64, 65, 129, size.context]
    chunks = [(size.tokens // 2, size.tokens // 2), (17, 17), (16, size.context), (2, 2)]
    if window is not None:
        single += [window - 1, window, window + 1, 2 * window + 7]
        chunks += [(7, window + 3), (window + 9, 2 * window + 30)]
    singles: list[Length] = [(1, max(1, context)) for context in single]

    def case(label: str, lengths: Sequence[Length], is_timed: bool = False) -> Case:
        return _case(layer, lengths, block_size, inputs, label + name, is_timed)

    yield case("one token", [(1, size.context)], True)
    yield case("three tokens", singles[-3:])
    yield case("single tokens", singles)
    yield case("many single tokens", [(1, size.context - row % 17) for row in range(size.rows)])
    yield case("chunks", chunks)
    yield case("single tokens and chunks", [*singles[:4], *chunks[1:]])
    if size.rows > len(singles):
        context = size.context // 2
        yield case(f"{size.rows} tokens", [(1, context)] * size.rows, True)
        yield case(f"a chunk of {size.tokens}", [(size.tokens, size.tokens)], True)


def _case(
    layer: Attention | LatentAttention,
    lengths: Sequence[Length],
    block_size: int,
    inputs: Inputs,
    label: str,
    is_timed: bool,
) -> Case:
    heads, spec = layer.heads, layer.spec
    batch, group, blocks = paged_batch(lengths, spec.window, block_size, inputs)
    tokens = sum(query for query, _ in lengths)
    query = inputs.normal(tokens, heads.heads, heads.head_dim)
    vectors = 2 if spec.latent_dim is None else 1
    kv = inputs.normal(vectors, blocks, block_size, heads.kv_heads, heads.head_dim)
    _mark_edges(query, kv, lengths, group, spec.window, inputs)
    kv = read_kv(rounded(kv, inputs.kv_dtype), torch.float32)  # the same values for every backend
    _set_unread_to_nan(kv, lengths, group, spec.window)
    sinks = None
    if layer.has_sinks:  # about as large as the scores of marked keys
        sinks = inputs.normal(heads.heads) + heads.head_dim * spec.scale

    def prepare(backend: Backend) -> Callable[[], Tensors]:
        dtype = backend.dtype
        own_query, own_kv = query.to(dtype), rounded(kv, backend.kv_dtype)
        own_sinks = None if sinks is None else sinks.to(dtype)
        return lambda: (backend.attention(own_query, own_kv, batch, group, spec, own_sinks),)

    pairs, positions = 0, 0
    for count, context in lengths:
        seen = [min(spec.window or p + 1, p + 1) for p in range(context - count, context)]
        pairs += sum(seen)
        positions += min(context, count - 1 + (spec.window or context))
    item = inputs.dtype.itemsize
    vector = vector_width(inputs.kv_dtype, heads.head_dim) * inputs.kv_dtype.itemsize
    moved = vectors * positions * heads.kv_heads * vector + 2 * query.numel() * item
    flops = 4 * pairs * heads.heads * heads.head_dim
    return Case("attention", label, prepare, moved, flops, is_timed)


def paged_batch(
    lengths: Sequence[Length], window: int | None, block_size: int, inputs: Inputs
) -> tuple[ForwardBatch, GroupTables, int]:
    """Return a batch of sequences in scattered blocks, and the number of blocks.

    Sequences with a single token come first, as a step has them. Of every second sequence the
    blocks behind the window are freed: their place in the table is the null block's.
    """
    lengths = list(lengths)
    assert [query == 1 for query, _ in lengths] == sorted(
        (query == 1 for query, _ in lengths), reverse=True
    )
    counts = [-(-context // block_size) for _, context in lengths]
    ids = (inputs.order(sum(counts)) + 1).cpu().int()
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, own in enumerate(ids.split(counts)):
        table[row, : len(own)] = own
        if window is not None and row % 2:
            query, context = lengths[row]
            table[row, : max(0, context - query - window + 1) // block_size] = 0
    queries = [query for query, _ in lengths]
    contexts = [context for _, context in lengths]
    none = torch.zeros(0, dtype=torch.int64, device=inputs.device)
    batch = ForwardBatch(
        none,
        none,
        queries,
        contexts,
        sum(query == 1 for query in queries),
        (),
        none,
        torch.tensor([0, *queries]).cumsum(0).int().to(inputs.device),
        torch.tensor(contexts, dtype=torch.int32, device=inputs.device),
    )
    return batch, GroupTables(table.to(inputs.device), none), sum(counts) + 1 + _SPARE_BLOCKS


def _mark_edges(
    query: torch.Tensor,
    kv: torch.Tensor,
    lengths: Sequence[Length],
    group: GroupTables,
    window: int | None,
    inputs: Inputs,
) -> None:
    """Make keys at the edges of windows and tiles equal to queries, so that they dominate.

    A softmax over hundreds of random keys hardly changes if one is left out.
    """
    _, _, block_size, kv_heads, _ = kv.shape
    share, token = query.shape[1] // kv_heads, 0
    by_head = query.unflatten(1, (kv_heads, share))
    for row, (count, context) in enumerate(lengths):
        new = range(context - count, context)
        marked = [(position, token + position - new.start) for position in new]
        if count == 1:
            first = max(0, context - (window or context))
            edges = sorted({first, *(e for e in _EDGES if first < e < context - 1)})
            marked += [(position, token) for position in edges if position != context - 1]
        at, source = torch.tensor(marked, device=inputs.device).T
        block = group.block_table[row].long()[at // block_size]
        number = torch.arange(len(marked), device=inputs.device) % share
        kv[0, block, at % block_size] = by_head[source, :, number]
        token += count


def _set_unread_to_nan(
    kv: torch.Tensor, lengths: Sequence[Length], group: GroupTables, window: int | None
) -> None:
    """Set all slots that no query may read to NaN; the null block has zeros."""
    block_size = kv.shape[2]
    is_read = torch.zeros(kv.shape[1:3], dtype=torch.bool, device=kv.device)
    for row, (count, context) in enumerate(lengths):
        first = 0 if window is None else max(0, context - count - window + 1)
        at = torch.arange(first, context, device=kv.device)
        is_read[group.block_table[row].long()[at // block_size], at % block_size] = True
    kv.masked_fill_(~is_read[None, :, :, None, None], float("nan"))
    kv[:, 0] = 0
