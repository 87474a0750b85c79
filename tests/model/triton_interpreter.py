"""Compare every Triton kernel with the reference, in Triton's interpreter.

pytest does not collect this file by its name: TRITON_INTERPRET must be set before Triton is
imported, so test_triton.py runs it in a separate process.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton import jit
from triton.runtime.interpreter import interpreter_builder

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.execution import model_runner
from model.formats import PER_HEAD
from model.ops.backend import Backend
from model.ops.cpu.backend import CpuBackend
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.kv_values import rounded
from model.ops.mxfp4 import Mxfp4
from model.ops.specs import (
    Activation,
    AttentionSpec,
    ExpertGroups,
    ExpertShard,
    HeadLinear,
    Heads,
    Norm,
    NormSpec,
    RopeArgs,
    Router,
    RouterSpec,
)
from model.ops.triton import attention as attention_kernels
from model.ops.triton import experts as expert_kernels
from model.ops.triton import fused as fused_kernels
from model.ops.triton import mxfp4
from model.ops.triton.attention import Splitting
from model.ops.triton.backend import TritonBackend
from model.ops.triton.mxfp4 import unpack
from model.ops.triton.sort_by_expert import sort_by_expert
from model.ops.triton.tiles import Target, Tile, chosen_tile, row_blocks, target_of
from tests.checkpoints import quantize_mxfp4, write_checkpoint
from tests.model.ops_helpers import (
    CPU,
    experts_of,
    heads_with_norms,
    linear_of,
    norm_of,
    packed_experts,
    reference,
    rope_args,
)
from tests.model.test_ops import paged, rand
from tests.test_end_to_end import DATA
from tokenizer import Tokenizer

# float16 uses the same tiles as bfloat16, which the interpreter cannot multiply.
DTYPES = [torch.float32, torch.float16]
REFERENCE = reference()
GPT_OSS, PLAIN = Activation(7.0, 1.702), Activation()
AFTER_TOP_K = RouterSpec(2, softmax_after_top_k=True, normalize=False)
ONE_ROW = Tile(1, 16, 32, 4, 3)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def kernels(
    dtype: torch.dtype = torch.float32, *, kv_dtype: str = "auto", **tiles: Any
) -> TritonBackend:
    """The kernels, with some fields of `Tiles` changed."""
    target = target_of(CPU)
    target = replace(target, tiles=replace(target.tiles, **tiles))
    return TritonBackend(CPU, dtype, target, kv_dtype=kv_dtype)


def with_processors(count: int) -> TritonBackend:
    """The kernels of a device that runs this number of programs at once."""
    return TritonBackend(CPU, torch.float32, replace(target_of(CPU), processors=count))


def close(found: torch.Tensor, expected: torch.Tensor, slack: float = 1.0) -> None:
    tolerance = TOLERANCE[expected.dtype] * slack
    assert torch.isfinite(expected.float()).all()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 896, 2880])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_norm_and_residual(tokens: int, size: int, dtype: torch.dtype) -> None:
    x, delta = rand(tokens, size), rand(tokens, size, seed=1, dtype=dtype)
    norm = norm_of(rand(size, seed=2))
    for change in (None, delta):
        summed, normed = kernels(dtype).add_rms_norm(x, change, norm)
        expected_sum, expected = reference(dtype).add_rms_norm(x, change, norm)
        assert torch.equal(summed, expected_sum)
        assert normed.dtype == dtype
        close(normed, expected)  # the interpreter truncates to bfloat16


@pytest.mark.parametrize("one_row", [None, ONE_ROW])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_delta_may_be_the_parts_that_norm_experts_returns(
    rows: int, one_row: Tile | None
) -> None:
    size, parts = 72, 3
    x, delta, norm = rand(rows, size), rand(rows, parts, size, seed=1), norm_of(rand(size, seed=2))
    ops = kernels(fused_qkv=8, one_row=one_row)
    expected_sum, expected = REFERENCE.add_rms_norm(x, delta, norm)
    assert torch.equal(expected_sum, x + (delta[:, 0] + delta[:, 1] + delta[:, 2]))
    for found in (ops.add_rms_norm(x, delta, norm), kernels().add_rms_norm(x, delta, norm)):
        assert torch.equal(found[0], expected_sum)
        close(found[1], expected)
    qkv, cos_sin = linear_of(rand(4 * 32, size, seed=3) * 0.2), rand(rows, 32, seed=4)
    kvs = [torch.zeros(2, 7, 4, 1, 32) for _ in range(2)]
    ropes = [rope_args(kv, cos_sin, torch.arange(rows), 2) for kv in kvs]
    expected_sum, expected = REFERENCE.norm_qkv(x, delta, norm, qkv, ropes[0])
    summed, query = ops.norm_qkv(x, delta, norm, qkv, ropes[1])
    assert torch.equal(summed, expected_sum)
    close(query, expected, 3)
    close(kvs[1], kvs[0], 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("rows", "count", "top_k", "router_spec"),
    [
        (1, 8, 1, AFTER_TOP_K),
        (1, 32, 4, AFTER_TOP_K),
        (3, 6, 3, RouterSpec(3, False, True)),
        (16, 12, 8, RouterSpec(8, False, False)),
        (3, 12, 4, RouterSpec(4, False, True, True, True, ExpertGroups(4, 3, 2), 1.5)),
    ],
)
def test_norm_router_and_experts(
    rows: int,
    count: int,
    top_k: int,
    router_spec: RouterSpec,
    ranks: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One kernel for norm and router, one for routing and sorting, and no sum on a single rank."""
    hidden, size, held = 72, 32, count // ranks
    spec = replace(router_spec, top_k=top_k)
    x, delta, norm = rand(rows, hidden), rand(rows, hidden, seed=1, dtype=dtype), rand(hidden)
    router = linear_of(rand(count, hidden, seed=6, dtype=dtype), rand(count, seed=7, dtype=dtype))
    launched = Counter[str]()
    for name in ("norm_linear", "route_and_sort", "sum_pairs"):
        original = getattr(fused_kernels, name)

        def counted(*given: Any, name: str = name, original: Any = original, **named: Any) -> Any:
            launched[name] += 1
            return original(*given, **named)

        monkeypatch.setattr(fused_kernels, name, counted)
    for rank in range(ranks):
        gate_up = rand(held, 2 * size, hidden, seed=2, dtype=dtype) * 0.2
        down = rand(held, hidden, size, seed=4, dtype=dtype) * 0.2
        biases = rand(held, 2 * size, seed=3, dtype=dtype), rand(held, hidden, seed=5, dtype=dtype)
        experts = experts_of(gate_up, biases[0], down, biases[1])
        ops, shard = kernels(dtype, fused_router=16), ExpertShard(rank, ranks)
        correction = rand(count, seed=8) / 4 if spec.has_correction else None
        arguments = x, delta, norm_of(norm), Router(router, spec, correction)
        expected_sum, expected = reference(dtype).norm_experts(*arguments, experts, GPT_OSS, shard)
        launched.clear()
        found = ops.norm_experts(*arguments, packed_experts(ops, experts), GPT_OSS, shard)
        assert launched == {
            "norm_linear": 1,
            "route_and_sort": 1,
            **({"sum_pairs": 1} if ranks > 1 else {}),
        }
        assert torch.equal(found[0], expected_sum)
        assert found[1].shape == ((rows, top_k, hidden) if ranks == 1 else (rows, hidden))
        if ranks == 1:
            found = found[0], found[1].float().sum(1).to(dtype)
        close(found[1], expected, 5)


def test_more_rows_are_normed_routed_and_summed_separately() -> None:
    hidden, count = 32, 4
    norm, router = norm_of(rand(hidden)), linear_of(rand(count, hidden, seed=1))
    up, down = rand(count, 64, hidden, seed=2), rand(count, hidden, 32, seed=3)
    for rows, fused in ((17, 16), (3, 2), (0, 16)):
        ops = kernels(fused_router=fused)
        experts = packed_experts(ops, experts_of(up, None, down, None))
        x, delta = rand(rows, hidden), rand(rows, hidden, seed=4)
        found = ops.norm_experts(x, delta, norm, Router(router, AFTER_TOP_K), experts, PLAIN)
        choice = Router(router, AFTER_TOP_K)
        arguments = norm, choice, experts_of(up, None, down, None), PLAIN
        expected = REFERENCE.norm_experts(x, delta, *arguments)
        assert torch.equal(found[0], expected[0])
        close(found[1], expected[1], 5)


@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize(("tokens", "size"), [(0, 64), (5, 72), (3, 2880)])
def test_embedding(tokens: int, size: int, scale: float) -> None:
    table = rand(11, size, dtype=torch.bfloat16)
    for first in (0, 7):  # a rank's table may start with another token
        ids = torch.arange(5, 5 + 3 * tokens, 3)
        found = kernels(torch.bfloat16).embed(table, ids, scale, first)
        assert torch.equal(found, reference(torch.bfloat16).embed(table, ids, scale, first))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("dim", "rotary"), [(32, 32), (64, 64), (80, 80), (128, 128), (32, 16), (128, 96), (80, 20)]
)
@pytest.mark.parametrize("heads", [(4, 4), (7, 1), (6, 2)])
def test_rotary_norms_and_kv_write(
    heads: tuple[int, int], dim: int, rotary: int, norms: bool
) -> None:
    tokens, (queries, kv_heads) = 5, heads
    qkv = rand(tokens, queries + 2 * kv_heads, dim)
    cos_sin = rand(tokens, rotary, seed=1)
    weights = (rand(dim, seed=2), rand(dim, seed=3)) if norms else None
    slots = torch.tensor([9, 3, 4, 15, 12])
    expected_kv, found_kv = (torch.full((2, 4, 4, kv_heads, dim), 7.0) for _ in range(2))
    expected, found = (
        ops.rotate_and_write(qkv, rope_args(kv, cos_sin, slots, queries, weights))
        for ops, kv in ((REFERENCE, expected_kv), (kernels(), found_kv))
    )
    close(found, expected)
    close(found_kv, expected_kv)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("norms", ["after the rotation", "of all heads at once", "none"])
def test_other_norms_of_heads_and_scaled_queries(norms: str, scaled: bool) -> None:
    tokens, queries, kv_heads, dim = 5, 6, 2, 80
    qkv = rand(tokens, queries + 2 * kv_heads, dim)
    heads = heads_with_norms(queries, kv_heads, dim, norms)
    found = []
    for ops in (REFERENCE, kernels()):
        kv = torch.full((2, 4, 4, kv_heads, dim), 7.0)
        slots, scale = torch.tensor([9, 3, 4, 15, 12]), 1 + rand(tokens, 1).abs()
        cos_sin = rand(tokens, 40, seed=1)
        rope = RopeArgs(heads, cos_sin, kv, slots, scale if scaled else None)
        found.append((ops.rotate_and_write(qkv.clone(), rope), kv))
    close(found[1][0], found[0][0])
    close(found[1][1], found[0][1])


def test_a_sum_without_a_norm_is_only_rounded() -> None:
    x, delta = rand(3, 72), rand(3, 72, dtype=torch.float16)
    norm = Norm(72, NormSpec(1e-6), is_identity=True)
    total, rounded = kernels(torch.float16).add_rms_norm(x, delta, norm)
    assert torch.equal(total, x + delta)
    assert torch.equal(rounded, total.half())


def attend(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    window: int | None,
    sinks: bool,
    dtype: torch.dtype = torch.float32,
    block_size: int = 8,
    ops: TritonBackend | None = None,
) -> None:
    batch, group, blocks = paged(lengths, window, block_size)
    query = rand(sum(q for q, _ in lengths), heads[0], dim, dtype=dtype)
    kv = rand(2, blocks + 3, block_size, heads[1], dim, seed=1, dtype=dtype)
    kv[:, blocks:] = float("nan")
    # Slots after a context, before its window and in free blocks may hold anything.
    for row, (count, context) in enumerate(lengths):
        if context % block_size:
            last = group.block_table[row, context // block_size]
            kv[:, last, context % block_size :] = float("nan")
        if window is not None:
            for at in range(max(0, context - count - window + 1)):
                kv[:, group.block_table[row, at // block_size], at % block_size] = float("nan")
    kv[:, 0] = 0
    column = rand(heads[0], seed=2, dtype=dtype) * 2 if sinks else None
    spec = AttentionSpec(dim**-0.5, window)
    expected = REFERENCE.attention(query, kv, batch, group, spec, column)
    close((ops or kernels()).attention(query, kv, batch, group, spec, column), expected)


MIXED = [(1, 50), (1, 17), (20, 20), (7, 40), (2, 2)]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "fp8"])
def test_a_cache_in_another_dtype_is_written_and_read(name: str) -> None:
    heads, kv_heads, dim, tokens = 6, 2, 32, 8
    ops = kernels(torch.float16, kv_dtype=name)
    qkv = rand(tokens, heads + 2 * kv_heads, dim, dtype=torch.float16)
    qkv[0] *= 300  # beyond the range of fp8
    cos_sin, slots = rand(tokens, dim, seed=1), torch.tensor([9, 3, 4, 15, 12, 2, 0, 7])
    args = [
        rope_args(backend.empty_cache((2, 4, 4, kv_heads, dim)).zero_(), cos_sin, slots, heads)
        for backend in (ops, Backend(CPU, torch.float16, name))
    ]
    found = ops.rotate_and_write(qkv, args[0])
    close(found, reference(torch.float16).rotate_and_write(qkv, args[1]))
    written, expected = (each.kv.float() for each in args)
    assert written.isfinite().all()
    assert (written != 0).any()
    # Within one step of fp8: the interpreter does not round float16 and bfloat16 to nearest, and in
    # fp8 it loses the carry into the exponent, which halves the result.
    is_near = (written - expected).abs() <= expected.abs() * 2**-3 + 2**-9
    assert (is_near | (written * 2 == expected)).all()
    assert is_near.float().mean() > 0.9
    attend_to(name)


def attend_to(name: str) -> None:
    batch, group, blocks = paged(MIXED, 24, 8)
    query = rand(sum(q for q, _ in MIXED), 6, 32, dtype=torch.float16)
    kv = rounded(rand(2, blocks, 8, 2, 32, seed=1), Backend(CPU, torch.float16, name).kv_dtype)
    spec = AttentionSpec(32**-0.5, 24)
    expected = reference(torch.float16).attention(query, kv, batch, group, spec)
    close(kernels(torch.float16, kv_dtype=name).attention(query, kv, batch, group, spec), expected)


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("heads", "sinks"), [((2, 2), True), ((6, 2), False), ((7, 1), True)])
@pytest.mark.parametrize("lengths", [[(1, 1)], [(1, 170), (1, 1), (1, 16)], [(70, 70)], MIXED])
def test_attention(
    lengths: list[tuple[int, int]], heads: tuple[int, int], window: int | None, sinks: bool
) -> None:
    attend(lengths, heads, 32, window, sinks)


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 192, 256])
def test_attention_of_head_sizes(dim: int) -> None:
    attend(MIXED, (8, 2), dim, 24, True)
    attend(MIXED, (8, 2), dim, None, False, torch.float16, 16)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 100, 200])
@pytest.mark.parametrize("sinks", [False, True])
def test_long_rows_are_split(rows: int, window: int | None, sinks: bool) -> None:
    """A sink counts once for all parts of a row."""
    ops = with_processors(16)
    lengths = [(1, 300), (1, 40), (1, 1), (1, 33), (1, 129)][:rows]
    split = Splitting.of(rows, 2, window, ops.target.tiles.decode, 16)
    assert split.max_parts > 1
    assert split.part_len < 100
    for _ in range(2):  # a captured launch is repeated: it must leave the counters as they were
        attend(lengths, (6, 2), 32, window, sinks, ops=ops)
        assert not ops._arrivals.any()


def test_a_window_of_one_part_is_not_split() -> None:
    split = Splitting.of(1, 2, 64, target_of(CPU).tiles.decode, 16)
    assert (split.max_parts, split.extras) == (1, 0)


def split_by(monkeypatch: pytest.MonkeyPatch, split: Splitting) -> None:
    monkeypatch.setattr(attention_kernels.Splitting, "of", lambda *_: split)


@pytest.mark.parametrize("extras", [3, 150])
def test_few_programs_share_many_parts(extras: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also parts of rows that are counted in the second round, and of rows without keys."""
    split_by(monkeypatch, Splitting(3, 16, extras))
    lengths = [(1, 1 + i % 17) for i in range(130)]
    lengths[3] = lengths[129] = (1, 70)
    attend(lengths, (2, 1), 16, None, True, ops=(ops := with_processors(16)))
    assert not ops._arrivals.any()


@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 96, 127, 128, 129])
def test_lengths_at_the_edges_of_tiles_and_parts(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_by(monkeypatch, Splitting(4, 32, 2))
    for window in (None, 32, 64, length - 1, length, length + 1):
        attend([(1, length), (1, 32), (5, length)], (3, 1), 32, window, True)


def test_the_part_that_ends_last_combines_all_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the order in which programs run, the result is the same to the last bit."""
    split_by(monkeypatch, Splitting(8, 16, 5))
    batch, group, blocks = paged([(1, 100), (1, 20), (1, 61)], None, 8)
    query, kv = rand(3, 4, 32), rand(2, blocks, 8, 2, 32, seed=1)
    ops, spec = with_processors(16), AttentionSpec(32**-0.5, None)
    programs = (5 + 3) * 2
    expected = ops.attention(query, kv, batch, group, spec)
    close(expected, REFERENCE.attention(query, kv, batch, group, spec))
    set_index = interpreter_builder.set_grid_idx
    for seed in range(4):
        order = torch.randperm(programs, generator=torch.Generator().manual_seed(seed)).tolist()
        monkeypatch.setattr(
            interpreter_builder,
            "set_grid_idx",
            lambda x, y, z, order=order: set_index(order[x], y, z),
        )
        assert torch.equal(ops.attention(query, kv, batch, group, spec), expected)
        assert not ops._arrivals.any()


def test_how_a_row_is_split_does_not_depend_on_the_other_rows() -> None:
    """In a step of the same shape a row has the same result beside short and beside long rows."""
    ops, spec = with_processors(16), AttentionSpec(32**-0.5, None)
    results = []
    for other in (1, 70, 400):
        batch, group, blocks = paged([(1, 300), (1, other), (1, 40)], None, 8)
        order = group.block_table[0, :38].long(), group.block_table[2, :5].long()
        query, kv = rand(3, 4, 32), rand(2, blocks, 8, 2, 32, seed=1)
        kv[:, order[0]], kv[:, order[1]] = (rand(2, len(ids), 8, 2, 32, seed=5) for ids in order)
        results.append(ops.attention(query, kv, batch, group, spec)[[0, 2]])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rows_that_pad_a_batch_give_zeros() -> None:
    batch, group, blocks = paged([(1, 9), (1, 5)], None, 8)
    batch.context_lens[1] = 0
    query, kv = rand(2, 4, 32), rand(2, blocks, 8, 2, 32, seed=1)
    for sinks in (None, rand(4, seed=2)):
        out = kernels().attention(query, kv, batch, group, AttentionSpec(32**-0.5, None), sinks)
        assert not out[1].any()
        assert out[0].all()


def test_attention_multiplies_scores_by_the_scale_of_its_spec() -> None:
    batch, group, blocks = paged([(1, 170), (20, 40)], None, 8)
    query, kv = rand(21, 4, 32), rand(2, blocks, 8, 2, 32, seed=1)
    kv[:, 0] = 0
    for scale in (0.05, 1.0):
        spec = AttentionSpec(scale, None)
        expected = REFERENCE.attention(query, kv, batch, group, spec)
        close(kernels().attention(query, kv, batch, group, spec), expected)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_scores_are_capped_softly(cap: float) -> None:
    batch, group, blocks = paged([(1, 170), (20, 40)], None, 8)
    query, kv = 4 * rand(21, 4, 32), rand(2, blocks, 8, 2, 32, seed=1)
    for window in (None, 24):
        spec = AttentionSpec(0.5, window, cap)
        expected = REFERENCE.attention(query, kv, batch, group, spec)
        close(kernels().attention(query, kv, batch, group, spec), expected)


@pytest.mark.parametrize("heads", [5, 24])
def test_attention_to_latents(heads: int) -> None:
    lengths = [(1, 50), (1, 1), (1, 33), (20, 20), (7, 40)]
    batch, group, blocks = paged(lengths, None, block_size=16)
    query = rand(sum(q for q, _ in lengths), heads, 40 + 24)
    kv, spec = rand(1, blocks, 16, 1, 40 + 24, seed=1), AttentionSpec(0.2, None, latent_dim=40)
    for row, (_, context) in enumerate(lengths):
        if context % 16:  # slots behind the context may hold anything
            kv[:, group.block_table[row, context // 16], context % 16 :] = float("nan")
    expected = REFERENCE.attention(query, kv, batch, group, spec)
    close(kernels().attention(query, kv, batch, group, spec), expected)


@pytest.mark.parametrize("heads", [3, 20])
def test_queries_of_latents(heads: int) -> None:
    query, latent = rand(5, heads, 24 + 16), rand(5, 40 + 16, seed=1)
    norm, angle = norm_of(rand(40, seed=2) + 1), rand(5, 8, seed=3)
    absorb = HeadLinear(heads, 24, 40, PER_HEAD, rand(heads, 40, 24, seed=4))
    cos_sin, slots = torch.cat((angle.cos(), angle.sin()), 1), torch.tensor([3, 17, 0, 30, 5])
    found = []
    for ops in (REFERENCE, kernels()):
        kv = torch.zeros(1, 2, 16, 1, 56)
        rope = RopeArgs(Heads(heads, 1, 56), cos_sin, kv, slots)
        found.append((ops.latent_query(query, latent, norm, absorb, rope), kv))
    for one, other in zip(*found, strict=True):
        close(other, one)
    x = rand(5, heads, 30)[..., :24]
    close(kernels().head_linear(x, absorb), REFERENCE.head_linear(x, absorb))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "activation", [Activation(), Activation(7.0, 1.702), Activation(kind="gelu_tanh")]
)
def test_gated_activations(activation: Activation, dtype: torch.dtype) -> None:
    gate_up = rand(5, 2 * 96, dtype=dtype) * 6
    close(kernels().activate(gate_up, activation), REFERENCE.activate(gate_up, activation), 2)


@pytest.mark.parametrize(
    "router",
    [
        RouterSpec(3, True, False),
        RouterSpec(3, False, True),
        RouterSpec(3, False, False, scale=2.5),
        RouterSpec(3, False, True, sigmoid=True),
        RouterSpec(2, False, False, groups=ExpertGroups(3, 2, 1)),
        RouterSpec(3, False, True, True, True, ExpertGroups(3, 2, 2), 1.5),
    ],
)
@pytest.mark.parametrize("count", [6, 120])
def test_router(count: int, router: RouterSpec) -> None:
    logits = rand(9, count)
    correction = rand(count, seed=1) / 4 if router.has_correction else None
    chosen, weights = kernels().route(logits, router, correction)
    expected_experts, expected_weights = REFERENCE.route(logits, router, correction)
    assert torch.equal(chosen, expected_experts)
    close(weights, expected_weights)


@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40)])
@pytest.mark.parametrize("gated", [False, True])
def test_add_gated(gated: bool, shape: tuple[int, ...]) -> None:
    x, y = rand(*shape), rand(shape[0], 40, seed=1)
    gate = rand(shape[0], 1, seed=2) if gated else None
    close(kernels().add_gated(x, y, gate), REFERENCE.add_gated(x, y, gate))


def test_a_row_of_nan_is_routed_to_valid_experts() -> None:
    chosen, _ = kernels().route(torch.full((1, 6), float("nan")), RouterSpec(3, True, False))
    assert chosen.min() >= 0
    assert chosen.max() < 6


@pytest.mark.parametrize("tokens", [1, 7, 64, 150])
def test_pairs_are_sorted_by_expert_and_otherwise_keep_their_order(tokens: int) -> None:
    chosen = torch.randint(0, 5, (tokens, 2), generator=torch.Generator().manual_seed(0))
    order, starts = sort_by_expert(chosen, 0, 6, target_of(CPU))
    flat = chosen.flatten()
    assert order.tolist() == flat.argsort(stable=True).tolist()
    assert starts.tolist() == [int((flat < e).sum()) for e in range(7)]
    order, starts = sort_by_expert(chosen, 1, 3, target_of(CPU))  # of 5
    before, here = int((flat < 1).sum()), int(((flat >= 1) & (flat < 4)).sum())
    assert starts.tolist() == [int((flat < e).sum()) - before for e in range(1, 5)]
    assert order[:here].tolist() == flat.argsort(stable=True)[before : before + here].tolist()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "dtype", "biases", "unbalanced", "short"),
    [
        (0, torch.float32, False, False, 0),
        (1, torch.float32, True, False, 0),
        (33, torch.float32, True, True, 0),
        (100, torch.float32, False, False, 16),
        (1, torch.float16, False, False, 16),
        (70, torch.float16, True, True, 0),
        (70, torch.float16, True, True, 16),  # 64 rows of each and 6 more
    ],
)
def test_experts(
    tokens: int,
    dtype: torch.dtype,
    biases: bool,
    unbalanced: bool,
    short: int,
    packed: bool,
) -> None:
    count, hidden, size, top_k = 6, 96, 160, 2
    x = rand(tokens, hidden, dtype=dtype)
    logits = rand(tokens, count, seed=1)
    if unbalanced:  # all tokens choose the same two experts
        logits[:, 2:] -= 100
    chosen, weights = REFERENCE.route(logits, RouterSpec(top_k, True, False))
    gate_up: Any = rand(count, 2 * size, hidden, seed=2, dtype=dtype) * 0.2
    down: Any = rand(count, hidden, size, seed=4, dtype=dtype) * 0.2
    if packed:
        gate_up, down = (Mxfp4(*quantize_mxfp4(w)) for w in (gate_up, down))
    up_bias = rand(count, 2 * size, seed=3, dtype=dtype) if biases else None
    down_bias = rand(count, hidden, seed=5, dtype=dtype) if biases else None
    activation = GPT_OSS if biases else PLAIN
    ops = kernels(dtype, short=short)
    experts = packed_experts(ops, experts_of(gate_up, up_bias, down, down_bias))
    assert experts.down.is_packed is packed
    found = ops.experts(x, chosen, weights, experts, activation)
    # The kernels accumulate in float32, so they are compared with a float32 reference.
    wide = [w.dense(torch.float32) if packed else w.float() for w in (gate_up, down)]
    wide_biases = [None if b is None else b.float() for b in (up_bias, down_bias)]
    wide_experts = experts_of(wide[0], wide_biases[0], wide[1], wide_biases[1])
    expected = REFERENCE.experts(x.float(), chosen, weights, wide_experts, activation)
    close(found, expected.to(dtype), 3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("top_k", [1, 4, 8])
def test_experts_with_any_number_of_rows(top_k: int, packed: bool) -> None:
    """Rows that fill tiles of 16, low tiles of 4 and tiles with 4 more rows; and none."""
    count, hidden, size = 11, 32, 32
    rows = [0, 1, 4, 5, 16, 17, 20, 21, 36, 37, 0]
    pool = [e for e, n in enumerate(rows) for _ in range(n)]
    chosen = torch.tensor(pool[: len(pool) // top_k * top_k]).view(top_k, -1).T
    x, weights = rand(len(chosen), hidden), rand(*chosen.shape, seed=1)
    gate_up: Any = rand(count, 2 * size, hidden, seed=2) * 0.2
    down: Any = rand(count, hidden, size, seed=4) * 0.2
    if packed:
        gate_up, down = (Mxfp4(*quantize_mxfp4(w)) for w in (gate_up, down))
    biases = rand(count, 2 * size, seed=3), rand(count, hidden, seed=5)
    high = (Tile(16, 16, 32, 4, 1),)
    ops = kernels(experts=high, mxfp4_gate_up=high, mxfp4_down=high, short=4)
    experts = experts_of(gate_up, biases[0], down, biases[1])
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        found = ops.experts(x, chosen, weights, packed_experts(ops, experts), GPT_OSS)
    finally:
        torch.use_deterministic_algorithms(False)
    close(found, REFERENCE.experts(x, chosen, weights, experts, GPT_OSS), 3)


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_mxfp4_in_the_order_of_amds_lanes_gives_the_same_results(columns: int) -> None:
    """Inputs and outputs fill neither all blocks of 128 columns nor all tiles."""
    count, hidden, size, tokens = 3, 96, 160, 18
    x, chosen = rand(tokens, hidden, dtype=torch.float16), torch.arange(2 * tokens).view(-1, 2) % 3
    stored = [(2 * size, hidden), (hidden, size)]
    weights = [Mxfp4(*quantize_mxfp4(rand(count, *s, seed=4) * 0.2)) for s in stored]
    experts = experts_of(weights[0], None, weights[1], None)
    tile = (Tile(16, 64, columns, 4, 1),)
    ops = kernels(torch.float16, mxfp4_gate_up=tile, mxfp4_down=tile)
    lanes = TritonBackend(CPU, torch.float16, replace(ops.target, architecture="gfx942"))
    found = []
    for backend in (ops, lanes):
        packed = packed_experts(backend, experts)
        assert packed.gate_up.is_packed
        assert packed.down.is_packed
        found.append(backend.experts(x, chosen, rand(tokens, 2), packed, PLAIN))
    assert packed.down.values.shape == (count, hidden // 16, 2 * 16 * 16)
    assert torch.equal(*found)
    odd = Mxfp4(*quantize_mxfp4(rand(1, 2 * 24, hidden)))  # 24 rows of gate: one block and a half
    assert not lanes.pack_mxfp4(odd).is_packed


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("tokens", [1, 100])
def test_a_shard_computes_only_its_own_experts(tokens: int, rank: int) -> None:
    count, hidden, size = 6, 96, 160
    x, logits = rand(tokens, hidden), rand(tokens, count, seed=1)
    logits[:, 3 * rank] -= 100
    chosen, weights = REFERENCE.route(logits, AFTER_TOP_K)
    up, down = rand(3, 2 * size, hidden, seed=2) * 0.2, rand(3, hidden, size, seed=4) * 0.2
    experts = experts_of(up, rand(3, 2 * size, seed=3), down, rand(3, hidden, seed=5))
    shard = ExpertShard(rank, 2)
    expected = REFERENCE.experts(x, chosen, weights, experts, GPT_OSS, shard)
    ops = kernels()
    packed = packed_experts(ops, experts)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        close(ops.experts(x, chosen, weights, packed, GPT_OSS, shard), expected, 3)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("columns", "run"), [(32, 2), (64, 4), (128, 2), (128, 4), (128, 8)])
def test_every_code_and_scale_of_mxfp4_is_unpacked_exactly(
    columns: int, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One-hot inputs of `experts` read every weight, for usual and unusual scales."""
    monkeypatch.setattr(Target, "mxfp4_run", run)
    tile = Tile(128, 32, columns, 4, 1)  # many rows for each program that unpacks
    monkeypatch.setattr(expert_kernels, "for_dtype", lambda *_: tile)
    size = 160  # five scales, one more than fits in a word
    codes = torch.arange(256, dtype=torch.uint8).view(16, 1, 16)  # every pair of codes
    blocks = torch.cat([codes.roll(g, 0) for g in range(5)], 1).repeat(12, 1, 1)
    ops = kernels()
    for exponent, is_packed in ((5, True), (70, True), (122, True), (131, False)):
        scales = exponent + torch.arange(192)[:, None] % 3 + torch.tensor([0, 4, -5, 1, 2])
        down = Mxfp4(blocks[None], scales.byte()[None])
        gate_up = torch.zeros(1, 2 * size, size + 32)
        gate_up[0, :size, size] = 30  # so large that silu is the identity; up is the input
        gate_up[0, size:, :size] = torch.eye(size)
        x = torch.cat((torch.eye(size), torch.ones(size, 32)), 1)
        zero, one = torch.zeros(size, 1, dtype=torch.int64), torch.ones(size, 1)
        packed = Mxfp4(*quantize_mxfp4(gate_up))
        experts = packed_experts(ops, experts_of(packed, None, down, None))
        assert experts.down.is_packed is is_packed  # the kernels take no scales above 2
        found = ops.experts(x, zero, one, experts, PLAIN)
        gate = packed.dense(torch.float32)[0, 0, size]
        assert torch.equal(found, down.dense(torch.float32)[0].T * gate)


@jit
def unpacked(  # type: ignore[no-untyped-def]
    values_ptr, scales_ptr, out_ptr, K: tl.constexpr, RUN: tl.constexpr, DTYPE: tl.constexpr
):
    row, column = tl.arange(0, 16), tl.arange(0, K)
    words = tl.load(values_ptr + row[:, None] * (K // 8) + tl.arange(0, K // 8)[None, :])
    found = unpack(words, tl.load(scales_ptr + row), 0, RUN, "none", DTYPE)
    tl.store(out_ptr + row[:, None] * K + column[None, :], found)


@pytest.mark.parametrize("run", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_is_unpacked_to_the_dtype_of_the_product(dtype: torch.dtype, run: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(1, 1, 4, 1)
    weights = Mxfp4(codes, torch.arange(65, 129, dtype=torch.uint8).view(1, 16, 4))
    words, out = mxfp4.pack(weights, dtype, run, 1), torch.empty(16, 128, dtype=dtype)
    assert words.is_packed
    kind = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    unpacked[(1,)](words.values, words.scales, out, K=128, RUN=run, DTYPE=kind)
    assert torch.equal(out, weights.dense(dtype)[0])


@pytest.mark.parametrize("run", [2, 4, 8])
def test_a_word_holds_the_values_that_a_lane_of_the_matrix_instruction_needs(run: int) -> None:
    """Runs of `run` columns, 4 · run apart, so that nothing is exchanged between lanes."""
    for column in range(32):
        nibble = 1 << 4 * (column % 2)  # the code 1 in this column, 0 in all others
        blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
        blocks[..., column // 2] = nibble
        weights = Mxfp4(blocks, torch.full((1, 2, 1), 120, dtype=torch.uint8))
        words = mxfp4.pack(weights, torch.bfloat16, run, 1).values[0, 0]
        assert words.nonzero().tolist() == [[column // run % 4]]


@pytest.mark.parametrize(
    ("rows", "processors", "width"),
    [(1, 100, 32), (1, 40, 64), (16, 100, 64)],  # 45 columns of 64 for each of 2 or 8 blocks
)
def test_a_narrow_tile_is_used_where_wide_ones_give_too_few_programs(
    rows: int, processors: int, width: int
) -> None:
    choices = Tile(16, 64, 64, 4, 2), Tile(16, 32, 64, 2, 2), Tile(64, 128, 64, 8, 2)
    tile = chosen_tile(choices, rows / 4, partial(row_blocks, 2 * rows, 8), 2880, processors)
    assert (tile.m, tile.n) == (16, width)


@pytest.fixture
def float16_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let float16 stand for bfloat16, which the interpreter does not multiply."""

    def fuses(ops: TritonBackend, x: torch.Tensor, norm: Norm, most_rows: int, *_: Any) -> bool:
        return 0 < len(x) <= most_rows

    monkeypatch.setattr(TritonBackend, "_fuses", fuses)


@pytest.mark.usefixtures("float16_is_fused")
@pytest.mark.parametrize(
    ("rows", "one_row", "heads", "dim", "norms", "dtype"),
    [
        (1, None, (4, 4), 32, False, torch.float32),
        (1, ONE_ROW, (4, 4), 32, False, torch.float32),
        (1, ONE_ROW, (5, 1), 64, False, torch.float16),
        (1, ONE_ROW, (6, 2), 80, False, torch.float16),
        (1, ONE_ROW, (6, 2), 32, True, torch.float16),
        (17, ONE_ROW, (5, 1), 64, False, torch.float16),
        (5, None, (6, 2), 128, False, torch.float16),
        (5, None, (6, 2), 80, False, torch.float16),  # halves of 40 are not whole blocks
        (17, None, (6, 2), 32, True, torch.float16),
    ],
)
def test_norm_with_qkv_and_rotary(
    rows: int,
    one_row: Tile | None,
    heads: tuple[int, int],
    dim: int,
    norms: bool,
    dtype: torch.dtype,
    fused_calls: Counter[str],
) -> None:
    size, (queries, kv_heads) = 72, heads
    x, delta, norm = rand(rows, size), rand(rows, size, seed=1, dtype=dtype), rand(1, size, seed=2)
    out = (queries + 2 * kv_heads) * dim
    weight, bias = rand(out, size, seed=3, dtype=dtype) * 0.2, rand(out, seed=4, dtype=dtype)
    cos_sin = rand(rows, dim, seed=5)
    of_heads = (rand(dim, seed=6, dtype=dtype), rand(dim, seed=7, dtype=dtype)) if norms else None
    slots = torch.randperm(28, generator=torch.Generator().manual_seed(8))[:rows]
    ops = kernels(dtype, fused_qkv=17, one_row=one_row)
    for change, column in ((delta, bias), (delta, None), (None, bias)):
        kvs = [torch.full((2, 7, 4, kv_heads, dim), 7.0, dtype=dtype) for _ in range(2)]
        ropes = [rope_args(kv, cos_sin, slots, queries, of_heads) for kv in kvs]
        parameters = norm_of(norm[0]), linear_of(weight, column)
        expected_sum, expected = reference(dtype).norm_qkv(x, change, *parameters, ropes[0])
        fused_calls.clear()
        found = ops.norm_qkv(x, change, *parameters, ropes[1])
        assert fused_calls == {"norm_linear": 1}
        assert torch.equal(found[0], expected_sum)
        close(found[1], expected, 3)
        close(kvs[1], kvs[0], 3)


@pytest.mark.parametrize("one_row", [None, ONE_ROW])
def test_partial_rotary_follows_a_fused_norm_and_projection(
    one_row: Tile | None, fused_calls: Counter[str]
) -> None:
    size, heads, kv_heads, dim, rotary = 72, 6, 2, 64, 48
    x, delta, norm = rand(1, size), rand(1, size, seed=1), norm_of(rand(size, seed=2))
    qkv = linear_of(rand((heads + 2 * kv_heads) * dim, size, seed=3) * 0.2)
    cos_sin, slots = rand(1, rotary, seed=4), torch.tensor([5])
    kvs = [torch.zeros(2, 7, 4, kv_heads, dim) for _ in range(2)]
    ropes = [rope_args(kv, cos_sin, slots, heads) for kv in kvs]
    expected_sum, expected = REFERENCE.norm_qkv(x, delta, norm, qkv, ropes[0])
    found = kernels(fused_qkv=1, one_row=one_row).norm_qkv(x, delta, norm, qkv, ropes[1])
    assert fused_calls == {"norm_linear": 1}
    assert torch.equal(found[0], expected_sum)
    close(found[1], expected, 3)
    close(kvs[1], kvs[0], 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "size"), [(4, 8), (37, 200), (300, 64)])
def test_one_row_times_a_weight(out: int, size: int, dtype: torch.dtype) -> None:
    ops = kernels(dtype, one_row=ONE_ROW)
    x, weight = rand(1, size, dtype=dtype), rand(out, size, seed=1, dtype=dtype)
    for bias in (None, rand(out, seed=2, dtype=dtype)):
        linear = linear_of(weight, bias)
        close(ops.linear(x, linear), REFERENCE.linear(x, linear))
    for scale in (1.0, 0.125):
        found = ops.logits(x, linear_of(weight), scale)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, x.float() @ weight.float().T * scale)


@pytest.mark.parametrize(("rows", "one_row"), [(1, None), (1, ONE_ROW), (17, None)])
def test_norm_with_mlp(rows: int, one_row: Tile | None, fused_calls: Counter[str]) -> None:
    size, inner = 112, 144
    x, delta, norm = rand(rows, size), rand(rows, size, seed=1), norm_of(rand(size, seed=2))
    gate_up, down = rand(2 * inner, size, seed=5) * 0.2, rand(size, inner, seed=6) * 0.2
    biases = rand(2 * inner, seed=7), rand(size, seed=8)
    for limit in ("fused_gate_up", "fused_mlp"):
        limits: dict[str, Any] = {limit: 17}
        ops = kernels(one_row=one_row, **limits)
        for up_bias, down_bias in ((None, None), biases):
            linears = linear_of(gate_up, up_bias), linear_of(down, down_bias)
            expected_sum, expected = REFERENCE.norm_mlp(x, delta, norm, *linears, PLAIN)
            fused_calls.clear()
            found = ops.norm_mlp(x, delta, norm, *linears, PLAIN)
            if limit == "fused_gate_up":
                assert fused_calls == {"norm_linear": 1}
            else:  # the kernel of a whole MLP takes no biases
                assert fused_calls == ({"_mlp": 1} if up_bias is None else {})
            assert torch.equal(found[0], expected_sum)
            close(found[1], expected, 5)


def test_nothing_is_fused_beyond_its_limit_or_where_no_limit_was_measured(
    fused_calls: Counter[str],
) -> None:
    x, norm, weight = rand(5, 32), norm_of(rand(32)), linear_of(rand(64, 32))
    down = linear_of(rand(32, 32))
    rope = rope_args(torch.zeros(2, 1, 5, 1, 16), rand(5, 16), torch.arange(5), 2)
    measured: dict[str, Any] = {"fused_qkv": 4, "fused_gate_up": 4, "fused_mlp": 4}
    for limits in ({}, measured):
        ops = kernels(**limits)
        ops.norm_qkv(x, x, norm, weight, rope)
        ops.norm_mlp(x, x, norm, weight, down, PLAIN)
        assert not fused_calls


def test_float16_is_not_fused_because_it_may_overflow_before_it_is_scaled(
    fused_calls: Counter[str],
) -> None:
    ops = kernels(torch.float16, fused_qkv=4, fused_gate_up=4, fused_mlp=4)
    x, delta, norm = rand(2, 32), rand(2, 32, dtype=torch.float16), norm_of(rand(32))
    weight = rand(64, 32, dtype=torch.float16)
    down = linear_of(weight.T[:, :32].contiguous())
    ops.norm_mlp(x, delta, norm, linear_of(weight), down, PLAIN)
    assert not fused_calls


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each fused product was called."""
    called = Counter[str]()
    for name in ("norm_linear", "_mlp"):
        original = getattr(fused_kernels, name)

        def counted(*given: Any, name: str = name, original: Any = original, **named: Any) -> Any:
            called[name] += 1
            return original(*given, **named)

        monkeypatch.setattr(fused_kernels, name, counted)
    return called


def test_a_model_with_fused_norms_gives_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused_calls: Counter[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "qwen2", "qwen2")
    backends: tuple[Backend, ...] = (
        CpuBackend(CPU, torch.float32),
        kernels(fused_qkv=4, fused_mlp=4, one_row=ONE_ROW),
    )
    requests = [Request([5, 6, 7], SamplingParams(max_new_tokens=3, ignore_eos=True))]
    tokens = []
    for backend in backends:
        monkeypatch.setattr(model_runner, "choose_backend", lambda *_, chosen=backend: chosen)
        with Engine(checkpoint, EngineConfig(dtype="float32", kv_memory=1 << 20)) as engine:
            tokens.append([c.token_ids for c in engine.generate(requests)])
            layers = len(engine.model_config.layers)
    assert tokens[0] == tokens[1]
    assert fused_calls == {"norm_linear": 3 * layers, "_mlp": 3 * layers}


def test_results_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    # On some processors the order of NumPy's sums depends on the number of rows.
    multiply = np.matmul
    monkeypatch.setattr(
        np, "matmul", lambda a, b, dtype: multiply(a, b, dtype=np.float64).astype(dtype)
    )
    count, hidden, size = 6, 64, 64
    gate_up = rand(count, 2 * size, hidden, seed=2) * 0.2
    down = rand(count, hidden, size, seed=4) * 0.2
    x = rand(40, hidden)
    chosen, weights = REFERENCE.route(rand(40, count, seed=1), RouterSpec(3, True, False))
    ops = kernels()
    experts = packed_experts(ops, experts_of(gate_up, None, down, None))
    whole = ops.experts(x, chosen, weights, experts, PLAIN)
    for row in (0, 17, 39):
        part = slice(row, row + 1)
        alone = ops.experts(x[part], chosen[part], weights[part], experts, PLAIN)
        assert torch.equal(alone[0], whole[row])


def test_attention_does_not_read_the_lists_of_a_batch() -> None:
    """A captured step is replayed with new tensors and without lists."""
    batch, group, blocks = paged([(1, 9), (5, 7)], None, 8)
    query, kv = rand(6, 4, 32), rand(2, blocks, 8, 2, 32, seed=1)
    spec = AttentionSpec(32**-0.5, None)
    expected = kernels().attention(query, kv, batch, group, spec)
    lists: Any = None
    stripped = ForwardBatch(**{**vars(batch), "host_query_lens": lists, "host_context_lens": lists})
    tables = GroupTables(group.block_table, group.slot_mapping)
    assert torch.equal(kernels().attention(query, kv, stripped, tables, spec), expected)


def test_the_model_of_the_repository_gives_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model has MXFP4 experts, sinks and windows; one prompt is longer than the window."""
    ids = Tokenizer.load(DATA / "model").encode("What is 17 plus 25? What is")
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    # The interpreter's time depends on the number of programs, so the tiles are large.
    large = Tile(16, 128, 128, 4, 1)
    monkeypatch.setattr(expert_kernels, "for_dtype", lambda tile, dtype: large)
    requests = [Request(ids, params, 0), Request(ids[:3], params, 1)]
    tokens = []
    for backend in (CpuBackend(CPU, torch.float32), kernels()):
        monkeypatch.setattr(model_runner, "choose_backend", lambda *_, chosen=backend: chosen)
        with Engine(DATA / "model", EngineConfig(dtype="float32", kv_memory=1 << 20)) as engine:
            found = {c.request_id: c.token_ids for c in engine.generate(requests)}
            tokens.append(found)
    assert tokens[0] == tokens[1]
