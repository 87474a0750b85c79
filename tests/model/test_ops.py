"""The operations of the CPU backend against the reference, over edge-case shapes."""

from importlib import import_module
from inspect import signature
from typing import Any

import pytest
import torch

from model.formats import HEAD
from model.ops.backend import Backend
from model.ops.cpu.bindings import kernels
from model.ops.cpu.onednn import OneDnnBackend
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.kv_values import read_kv, rounded
from model.ops.mxfp4 import dequantize_mxfp4
from model.ops.specs import (
    Activation,
    AttentionSpec,
    ExpertGroups,
    ExpertShard,
    Heads,
    Linear,
    Norm,
    NormSpec,
    RopeArgs,
    Router,
    RouterSpec,
)
from tests.model.ops_helpers import (
    CPU,
    cpu_backend,
    experts_of,
    head_linear_of,
    heads_with_norms,
    linear_of,
    norm_of,
    packed_experts,
    packed_linear,
    rand,
    random_mxfp4,
    reference,
    rope_args,
)

ROUTERS = [
    RouterSpec(4, True, False),
    RouterSpec(4, False, True),
    RouterSpec(4, False, False, scale=2.5),
    RouterSpec(3, False, True, sigmoid=True),
    RouterSpec(4, False, False, groups=ExpertGroups(4, 2, 1)),
    RouterSpec(3, False, True, has_correction=True),
    RouterSpec(
        3, False, True, sigmoid=True, has_correction=True, groups=ExpertGroups(4, 2, 2), scale=1.5
    ),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def paged(
    lengths: list[tuple[int, int]], window: int | None, block_size: int
) -> tuple[ForwardBatch, GroupTables, int]:
    """A batch of sequences (query length, context length) over scattered blocks."""
    blocks = [-(-context // block_size) for _, context in lengths]
    ids = iter(
        (torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(3)) + 1).tolist()
    )
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for row, count in enumerate(blocks):
        for i in range(count):
            table[row, i] = next(ids)
        if window is not None:  # blocks behind the window are freed
            query, context = lengths[row]
            table[row, : max(0, context - query - window + 1) // block_size] = 0
    starts = torch.tensor([0, *(query for query, _ in lengths)]).cumsum(0)
    tokens = int(starts[-1])
    empty = torch.zeros(tokens, dtype=torch.int64)
    batch = ForwardBatch(
        empty,
        empty,
        [query for query, _ in lengths],
        [context for _, context in lengths],
        sum(query == 1 for query, _ in lengths),
        (),
        empty,
        starts.int(),
        torch.tensor([context for _, context in lengths], dtype=torch.int32),
    )
    return batch, GroupTables(table, empty), sum(blocks) + 1


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5, 16, 40])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (40, 1)])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1)],
        [(1, 33), (1, 1), (1, 16)],
        [(9, 9)],
        [(1, 50), (1, 17), (20, 20), (7, 40), (2, 2)],
        [(1, 200), (1, 65), (1, 64), (70, 190), (3, 130)],
    ],
)
@pytest.mark.parametrize("head_dim", [16, 96])
def test_attention_equals_the_reference(
    head_dim: int,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    window: int | None,
    sinks: bool,
    dtype: torch.dtype,
) -> None:
    batch, group, blocks = paged(lengths, window, block_size=8)
    query = rand(sum(q for q, _ in lengths), heads[0], head_dim, dtype=dtype)
    kv = rand(2, blocks, 8, heads[1], head_dim, seed=1, dtype=dtype)
    kv[:, 0] = 0
    # Slots beyond a sequence's end may hold any value.
    for row, (_, context) in enumerate(lengths):
        if context % 8:
            kv[:, group.block_table[row, context // 8], context % 8 :] = float("nan")
    column = rand(heads[0], seed=2, dtype=dtype) * 2 if sinks else None
    spec = AttentionSpec(head_dim**-0.5, window)
    expected = reference(dtype).attention(query, kv, batch, group, spec, column)
    found = cpu_backend(dtype).attention(query, kv, batch, group, spec, column)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [0.015625, 0.1, 0.5])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_with_another_scale_equals_the_reference(
    window: int | None, scale: float, dtype: torch.dtype
) -> None:
    lengths = [(1, 200), (1, 65), (70, 190), (3, 3)]
    batch, group, blocks = paged(lengths, window, block_size=8)
    query = rand(sum(q for q, _ in lengths), 6, 64, dtype=dtype)
    kv, sinks = rand(2, blocks, 8, 2, 64, seed=1, dtype=dtype), rand(6, seed=2, dtype=dtype)
    spec = AttentionSpec(scale, window)
    expected = reference(dtype).attention(query, kv, batch, group, spec, sinks)
    found = cpu_backend(dtype).attention(query, kv, batch, group, spec, sinks)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 64), ((6, 2), 96), ((14, 1), 128)])
@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_attention_to_8_bits_equals_the_reference(
    kv_dtype: str,
    heads: tuple[int, int],
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    """Single tokens, chunks of prompts and whole ones; vectors have scales over some octaves."""
    lengths = [(1, 200), (1, 65), (1, 17), (70, 190), (3, 130), (20, 20)]
    batch, group, blocks = paged(lengths, window, block_size=8)
    ops, tokens = cpu_backend(dtype, kv_dtype), sum(q for q, _ in lengths)
    query, sinks = rand(tokens, heads[0], head_dim, dtype=dtype), rand(heads[0], seed=2)
    values = rand(2, blocks, 8, heads[1], head_dim, seed=1)
    values *= 2.0 ** (torch.arange(blocks * 8).view(-1, 8, 1, 1) % 5 - 3)
    for row, (_, context) in enumerate(lengths):  # slots beyond the end may hold any value
        if context % 8:
            values[:, group.block_table[row, context // 8], context % 8 :] = float("nan")
    kv = rounded(values, ops.kv_dtype)
    spec = AttentionSpec(head_dim**-0.5, window)
    stored = read_kv(kv, torch.float32)
    stored[:, 0] = kv.view(torch.uint8)[:, 0] = 0
    expected = reference(dtype).attention(query, stored, batch, group, spec, sinks.to(dtype))
    found = ops.attention(query, kv, batch, group, spec, sinks.to(dtype))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# Sizes that are left to torch, heads of two groups, and the widest latents.
@pytest.mark.parametrize("sizes", [(5, 24, 40, 16), (40, 32, 64, 32), (3, 64, 512, 64)])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8", "int8"])
def test_attention_to_latents_equals_the_reference(
    kv_dtype: str, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    heads, plain, rank, rotary = sizes
    lengths = [(1, 200), (1, 65), (70, 190), (3, 3)]
    batch, group, blocks = paged(lengths, None, block_size=8)
    tokens, angle = sum(q for q, _ in lengths), rand(76, rotary // 2, seed=5)
    query = rand(tokens, heads, plain + rotary, dtype=dtype)
    latent, norm = rand(tokens, rank + rotary, seed=1, dtype=dtype), norm_of(rand(rank, seed=2) + 1)
    cos_sin = torch.cat((angle.cos(), angle.sin()), 1)[:tokens]
    slots = torch.randperm(blocks * 8, generator=torch.Generator().manual_seed(0))[:tokens]
    up, down = rand(heads, rank, plain, seed=3, dtype=dtype), rand(heads, 32, rank, seed=4)
    results = []
    for ops in (Backend(CPU, dtype, kv_dtype), cpu_backend(dtype, kv_dtype)):
        kv = rounded(rand(1, blocks, 8, 1, rank + rotary, seed=6), ops.kv_dtype)
        rope = RopeArgs(Heads(heads, 1, rank + rotary), cos_sin, kv, slots)
        absorb, expand = (head_linear_of(ops, w * 0.2) for w in (up, down.to(dtype)))
        queries = ops.latent_query(query, latent, norm, absorb, rope)
        spec = AttentionSpec(0.1, None, latent_dim=rank)
        mixed = ops.attention(queries, kv, batch, group, spec)
        assert mixed.shape == (tokens, heads, rank)
        stored = read_kv(kv, torch.float32)
        results.append((queries, stored, mixed, ops.head_linear(mixed, expand)))
    for wanted, found in zip(*results, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(
            found.float() / scale, wanted.float() / scale, rtol=0, atol=TOLERANCE[dtype] / 2
        )


@pytest.mark.parametrize("cap", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_scores_are_capped_softly(head_dim: int, cap: float, dtype: torch.dtype) -> None:
    lengths = [(1, 200), (1, 65), (70, 190), (3, 3)]
    batch, group, blocks = paged(lengths, 30, block_size=8)
    query = 4 * rand(sum(q for q, _ in lengths), 6, head_dim, dtype=dtype)
    kv = rand(2, blocks, 8, 2, head_dim, seed=1, dtype=dtype)
    spec = AttentionSpec(0.5, 30, cap)
    expected = reference(dtype).attention(query, kv, batch, group, spec)
    found = cpu_backend(dtype).attention(query, kv, batch, group, spec)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    plain = reference(dtype).attention(query, kv, batch, group, AttentionSpec(0.5, 30))
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(0, 100), (3, 37), (70, 500)])
def test_logits_are_capped_softly(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = 100 * rand(*shape)
    logits.view(-1)[:4] = torch.tensor([1e30, -1e30, 0.0, 1e-6])[: logits.numel()]
    expected = 30 * torch.tanh(logits / 30)
    found = cpu_backend(dtype).softcap(logits.clone(), 30.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert cpu_backend(dtype).softcap(logits, None) is logits


@pytest.mark.parametrize("vocab", [5, 1024, 2100])
def test_argmax_is_the_first_of_the_largest_logits(vocab: int, dtype: torch.dtype) -> None:
    logits = rand(7, vocab).round()  # many are equal
    logits[1] = float("-inf")
    logits[2, -1] = logits[2, 3] = 50.0
    logits[3, -1] = 50.0
    logits[4, vocab // 2], logits[4, 1] = float("nan"), float("inf")
    logits[5] = float("nan")
    values, tokens = cpu_backend(dtype).argmax(logits)
    expected = torch.where(logits.isnan().any(1), float("nan"), logits.amax(1))
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    finite = [0, 1, 2, 3, 6]
    assert tokens[finite].tolist() == logits[finite].argmax(1).tolist()
    assert ((tokens >= 0) & (tokens < vocab)).all()  # also of rows that have none


@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("size", [40, 96, 1024])
def test_a_norm_alone_equals_the_reference(size: int, rows: int, dtype: torch.dtype) -> None:
    x, norm = 3 * rand(rows, size, dtype=dtype), norm_of(rand(size, seed=1) + 1)
    expected = reference(dtype).rms_norm(x, norm)
    torch.testing.assert_close(cpu_backend(dtype).rms_norm(x, norm), expected)


def test_a_sink_takes_its_share_of_the_softmax() -> None:
    """The reference itself, by hand: one key, one sink, half of the weight each."""
    batch, group, blocks = paged([(1, 1)], None, block_size=4)
    kv = torch.ones(2, blocks, 4, 1, 16)
    query = torch.ones(1, 2, 16)
    score = 16 * 16**-0.5
    spec = AttentionSpec(16**-0.5, None)
    out = reference().attention(query, kv, batch, group, spec, torch.tensor([score, -1e9]))
    torch.testing.assert_close(out[0, :, 0], torch.tensor([0.5, 1.0]))


def test_query_heads_share_the_kv_head_of_their_group() -> None:
    batch, group, blocks = paged([(1, 1)], None, block_size=4)
    kv = torch.zeros(2, blocks, 4, 2, 16)
    kv[1, :, :, 0], kv[1, :, :, 1] = 1.0, 2.0
    spec = AttentionSpec(16**-0.5, None)
    out = reference().attention(torch.ones(1, 6, 16), kv, batch, group, spec)
    assert out[0, :, 0].tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("unbalanced", [False, True])
def test_experts_equal_the_reference(
    tokens: int, biases: bool, unbalanced: bool, dtype: torch.dtype
) -> None:
    count, hidden, size, top_k = 6, 32, 64, 2
    x = rand(tokens, hidden, dtype=dtype)
    logits = rand(tokens, count, seed=1)
    if unbalanced:  # all tokens to two experts, none to the others
        logits[:, 2:] -= 100
    chosen, shares = reference().route(logits, RouterSpec(top_k, True, False))
    experts = experts_of(
        rand(count, 2 * size, hidden, seed=2, dtype=dtype) * 0.2,
        rand(count, 2 * size, seed=3, dtype=dtype) if biases else None,
        rand(count, hidden, size, seed=4, dtype=dtype) * 0.2,
        rand(count, hidden, seed=5, dtype=dtype) if biases else None,
    )
    activation = Activation(7.0 if biases else None, 1.702)
    expected = reference(dtype).experts(x, chosen, shares, experts, activation)
    backend = cpu_backend(dtype)
    packed = packed_experts(backend, experts)
    found = backend.experts(x, chosen, shares, packed, activation)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 33])
def test_results_of_expert_shards_add_up_to_that_of_all_experts(
    tokens: int, dtype: torch.dtype
) -> None:
    count, hidden, size, ranks = 6, 32, 64, 3
    x, logits = rand(tokens, hidden, dtype=dtype), rand(tokens, count, seed=1)
    logits[:, 2:4] -= 100  # no token for the experts of rank 1
    chosen, shares = reference().route(logits, RouterSpec(2, True, False))
    up = rand(count, 2 * size, hidden, seed=2, dtype=dtype) * 0.2
    down = rand(count, hidden, size, seed=4, dtype=dtype) * 0.2
    activation, plain, backend = Activation(7.0, 1.702), reference(dtype), cpu_backend(dtype)
    expected = plain.experts(x, chosen, shares, experts_of(up, None, down, None), activation)
    added = torch.zeros(tokens, hidden)
    for rank in range(ranks):
        own, shard = slice(2 * rank, 2 * rank + 2), ExpertShard(rank, ranks)
        experts = experts_of(up[own], None, down[own], None)
        part = plain.experts(x, chosen, shares, experts, activation, shard)
        packed = packed_experts(backend, experts)
        found = backend.experts(x, chosen, shares, packed, activation, shard)
        torch.testing.assert_close(found, part, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert bool(found.any()) is bool((chosen // 2 == rank).any())
        added += part.float()
    torch.testing.assert_close(
        added, expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize(("hidden", "size"), [(96, 64), (608, 416)])
@pytest.mark.parametrize("tokens", [1, 5, 40, 300])
def test_mxfp4_experts_equal_the_dense_reference(
    tokens: int, hidden: int, size: int, dtype: torch.dtype
) -> None:
    count, top_k = 4, 3
    x = rand(tokens, hidden, dtype=dtype)
    router = RouterSpec(top_k, True, False)
    chosen, shares = reference().route(rand(tokens, count, seed=1), router)
    up, down = random_mxfp4(count, 2 * size, hidden), random_mxfp4(count, hidden, size)
    for weights in (up, down):
        # The smallest scale: the values that it scales are negligible.
        weights.scales[0, 0, 0] = 0
    wide = [weights.dense(torch.float32) for weights in (up, down)]
    dense, activation = experts_of(wide[0], None, wide[1], None), Activation(7.0, 1.702)
    expected = reference().experts(x.float(), chosen, shares, dense, activation)
    backend = cpu_backend(dtype)
    packed = packed_experts(backend, experts_of(up, None, down, None))
    found = backend.experts(x, chosen, shares, packed, activation)
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        found.float() / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype] / 2
    )


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("delta", [False, True])
def test_norm_with_residual_equals_the_reference(
    delta: bool, rows: int, dtype: torch.dtype
) -> None:
    x = rand(rows, 96)
    added = rand(rows, 96, seed=1, dtype=dtype) if delta else None
    norm = norm_of(rand(96, seed=2))
    expected = reference(dtype).add_rms_norm(x, added, norm)
    results = cpu_backend(dtype).add_rms_norm(x, added, norm)
    for found, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("vocab", "hidden"), [(100, 96), (33, 32), (50, 40)])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_logits_are_not_rounded(
    scale: float, rows: int, vocab: int, hidden: int, dtype: torch.dtype
) -> None:
    x, weight = rand(rows, hidden, dtype=dtype), rand(vocab, hidden, seed=1, dtype=dtype)
    exact = (x.double() @ weight.double().T * scale).float()
    for backend in (reference(dtype), OneDnnBackend(CPU, dtype), cpu_backend(dtype)):
        head, stored = linear_of(weight), backend.empty_head((vocab, hidden))
        stored[:vocab].copy_(weight)
        for packed in (backend.pack_head(weight), backend.pack_head(stored)):  # tied, and its own
            head.weight = packed
            found = backend.logits(x, head, scale)
            assert found.dtype == torch.float32
            tolerance = 2e-5 if not kernels.int16_weights else 1e-3
            torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize("size", [40, 64])
def test_embeddings_are_scaled_in_float32(size: int, scale: float, dtype: torch.dtype) -> None:
    table, ids = rand(9, size, dtype=dtype), torch.tensor([0, 8, 3, 3])
    expected = table.float()[ids] * scale
    for backend in (reference(dtype), cpu_backend(dtype)):
        assert torch.equal(backend.embed(table, ids, scale), expected)
        part = backend.embed(table[5:], ids, scale, first=5)  # one rank's part of the vocabulary
        assert torch.equal(part, expected * (ids >= 5).unsqueeze(1))


@pytest.mark.parametrize("shape", [(0, 96), (1, 32), (3, 37), (70, 500)])
@pytest.mark.parametrize("factor", [1.0, 12.0, 0.22, -1 / 3])
def test_scaling_gives_the_bits_of_the_reference(
    factor: float, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = rand(*shape, dtype=dtype)
    found = cpu_backend(dtype).scale(x, factor)
    assert torch.equal(found, reference(dtype).scale(x, factor))
    assert (found is x) is (factor == 1)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(16, 16), (32, 32), (128, 128), (128, 96), (64, 32), (64, 48)]
)
def test_rotary_with_kv_write_equals_the_reference(
    head_dim: int, rotary_dim: int, norms: bool, dtype: torch.dtype
) -> None:
    tokens, heads, kv_heads = 7, 6, 2
    qkv = rand(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    angle = rand(tokens, rotary_dim // 2, seed=1)
    cos_sin = torch.cat((angle.cos(), angle.sin()), -1)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:tokens]
    weights = None
    if norms:
        weights = rand(head_dim, seed=2, dtype=dtype), rand(head_dim, seed=3, dtype=dtype)
    mine, theirs = (torch.zeros(2, 5, 8, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    ours, plain = (rope_args(kv, cos_sin, slots, heads, weights) for kv in (mine, theirs))
    found = cpu_backend(dtype).rotate_and_write(qkv, ours)
    expected = reference(dtype).rotate_and_write(qkv, plain)
    for one, other in ((found, expected), (mine, theirs)):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    if not norms:
        assert torch.equal(found[..., rotary_dim:], qkv[:, :heads, rotary_dim:])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("norms", ["after the rotation", "of all heads at once", "none"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (64, 64), (64, 32)])
def test_other_norms_of_heads_and_scaled_queries(
    head_dim: int, rotary_dim: int, norms: str, scaled: bool, dtype: torch.dtype
) -> None:
    tokens, heads, kv_heads = 7, 6, 2
    qkv = rand(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    angle = rand(tokens, rotary_dim // 2, seed=1)
    cos_sin = torch.cat((angle.cos(), angle.sin()), -1)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:tokens]
    scale = 1 + rand(tokens, 1).abs() if scaled else None
    of_layer, results = heads_with_norms(heads, kv_heads, head_dim, norms), []
    for backend in (cpu_backend(dtype), reference(dtype)):
        kv = torch.zeros(2, 5, 8, kv_heads, head_dim, dtype=dtype)
        rope = RopeArgs(of_layer, cos_sin, kv, slots, scale)
        results.append((backend.rotate_and_write(qkv, rope), kv))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_a_sum_without_a_norm_is_only_rounded(dtype: torch.dtype) -> None:
    x, delta = rand(3, 64, dtype=torch.float32), rand(3, 64, seed=1, dtype=dtype)
    norm = Norm(64, NormSpec(1e-6), is_identity=True)
    total, rounded = cpu_backend(dtype).add_rms_norm(x, delta, norm)
    assert torch.equal(total, x + delta)
    assert torch.equal(rounded, total.to(dtype))


@pytest.mark.parametrize(
    "activation", [Activation(), Activation(1.0, 1.702), Activation(kind="gelu_tanh")]
)
@pytest.mark.parametrize("rows", [0, 1, 9, 40])
@pytest.mark.parametrize("size", [48, 96])
def test_a_gated_linear_equals_the_reference(
    size: int, rows: int, activation: Activation, dtype: torch.dtype
) -> None:
    x, weight = rand(rows, 64, dtype=dtype), rand(2 * size, 64, seed=1, dtype=dtype)
    bias = rand(2 * size, seed=2, dtype=dtype)
    bias[:3] = torch.tensor([100.0, -100.0, 50.0])
    backend, wide = cpu_backend(dtype), linear_of(weight.float(), bias.float())
    expected = reference().gated_linear(x.float(), wide, activation)
    found = backend.gated_linear(x, packed_linear(backend, weight, bias), activation)
    torch.testing.assert_close(found.float(), expected, rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("router", ROUTERS)
def test_routers_equal_the_reference(router: RouterSpec, dtype: torch.dtype) -> None:
    logits = torch.stack([torch.randperm(16) for _ in range(9)]) / 4
    correction = rand(16, seed=1) / 4 if router.has_correction else None
    expected = reference(dtype).route(logits, router, correction)
    found = cpu_backend(dtype).route(logits, router, correction)
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own, wanted)


def test_router_logits_are_not_rounded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts whose logits are 2 and 2 + 2**-8, which is nearer than values of bfloat16."""
    ops, weight = cpu_backend(dtype), torch.full((2, 64), 1 / 32)
    weight[1, 0] += 2**-8
    storage = HEAD.allocate(ops, (2, 64))
    storage[:2].copy_(weight.to(dtype))
    router = Router(
        Linear(64, 2, False, HEAD, weight=HEAD.finish(ops, storage)),
        RouterSpec(1, False, True, sigmoid=True),
    )
    chosen, route = [], ops.route

    def spy(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        experts, weights = route(*arguments)
        chosen.append(experts.tolist())
        return experts, weights

    monkeypatch.setattr(ops, "route", spy)
    down, gate_up = rand(2, 64, 32, dtype=dtype), rand(2, 64, 64, dtype=dtype)
    experts = packed_experts(ops, experts_of(gate_up, None, down, None))
    delta, norm = torch.zeros(3, 64, dtype=dtype), norm_of(torch.ones(64))
    ops.norm_experts(torch.ones(3, 64), delta, norm, router, experts, Activation())
    assert chosen == [[[1]] * 3]


def test_routing_limits_experts_to_the_best_groups_and_weighs_them_without_the_correction() -> None:
    """By hand: three groups of two; the best expert of all is in the worst group."""
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.6, 0.7, 0.5]])
    logits, correction = torch.logit(scores), torch.tensor([0.0, 0, 0, 0.25, 0, 0])
    groups = ExpertGroups(3, 2, 2)
    router = RouterSpec(3, False, True, sigmoid=True, has_correction=True, groups=groups, scale=2.0)
    experts, weights = cpu_backend().route(logits, router, correction)
    assert experts.tolist() == [[3, 4, 2]]
    torch.testing.assert_close(weights, 2 * torch.tensor([[0.6, 0.7, 0.6]]) / 1.9)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [40, 96])
def test_a_shared_result_is_added_by_its_gate(size: int, gated: bool, dtype: torch.dtype) -> None:
    x, y = rand(5, size, dtype=dtype), rand(5, size, seed=1, dtype=dtype)
    gate = rand(5, 1, seed=2, dtype=dtype) if gated else None
    factor = 1.0 if gate is None else torch.sigmoid(gate.float())
    expected = (x.float() + factor * y.float()).to(dtype)
    torch.testing.assert_close(cpu_backend(dtype).add_gated(x, y, gate), expected)
    parts = torch.stack((x, x, y), 1)
    expected = (2 * x.float() + y.float() + factor * y.float()).to(dtype)
    torch.testing.assert_close(cpu_backend(dtype).add_gated(parts, y, gate), expected)


@pytest.mark.parametrize("kind", ["cpu", "triton"])
def test_backends_override_operations_with_the_signature_of_the_reference(kind: str) -> None:
    if kind == "triton":
        pytest.importorskip("triton")
    module = import_module(f"model.ops.{kind}.backend")
    backend = module.CpuBackend if kind == "cpu" else module.TritonBackend
    parts = [part for part in Backend.__mro__ if part is not object]
    operations = [name for part in parts for name in vars(part) if not name.startswith("_")]
    assert len(operations) > 40
    for name in operations:
        reference, own = (getattr(Backend, name), getattr(backend, name))
        if isinstance(reference, property):
            continue
        expected, found = (list(signature(f).parameters) for f in (reference, own))
        assert found == expected, name
        assert len(found) <= 8, f"{name} takes more than seven arguments"  # with self
    own_names = {n for n, v in vars(backend).items() if callable(v) and not n.startswith("_")}
    assert own_names <= set(operations)


def test_router_weights_follow_the_definition_of_each_family() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    shares = logits.softmax(-1)[0]
    experts, weights = cpu_backend().route(logits, RouterSpec(2, True, False))  # gpt-oss
    assert experts.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[3.0, 2.0]]).softmax(-1))
    _, weights = cpu_backend().route(
        logits, RouterSpec(2, False, True)
    )  # Mixtral, Qwen3-MoE with norm_topk_prob
    torch.testing.assert_close(weights[0], shares[[1, 2]] / shares[[1, 2]].sum())
    _, weights = cpu_backend().route(logits, RouterSpec(2, False, False))  # Qwen3-MoE without
    torch.testing.assert_close(weights[0], shares[[1, 2]])


def test_gpt_oss_swiglu_clamps_gate_above_and_up_on_both_sides() -> None:
    gate = torch.tensor([[9.0, -9.0, 1.0]])
    up = torch.tensor([[-9.0, 9.0, 0.5]])
    found = reference().activate(torch.cat((gate, up), -1), Activation(7.0, 1.702))
    clamped_gate, clamped_up = torch.tensor([[7.0, -9.0, 1.0]]), torch.tensor([[-7.0, 7.0, 0.5]])
    expected = clamped_gate * torch.sigmoid(1.702 * clamped_gate) * (clamped_up + 1)
    torch.testing.assert_close(found, expected)


def test_mxfp4_unpacks_low_nibble_first_with_power_of_two_scales() -> None:
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0] = 0x1 | (0xF << 4)  # 0.5, then -6
    blocks[0, 0, 15] = 0x7 | (0x8 << 4)  # 6, then -0
    dense = dequantize_mxfp4(blocks, torch.tensor([[128]], dtype=torch.uint8), torch.float32)
    assert dense.shape == (1, 32)
    assert dense[0, :2].tolist() == [1.0, -12.0]
    assert dense[0, 30:].tolist() == [12.0, 0.0]
    tiny = dequantize_mxfp4(blocks, torch.tensor([[0]], dtype=torch.uint8), torch.float32)
    assert float(tiny[0, 0]) == 2.0**-128
