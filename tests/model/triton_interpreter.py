"""Every Triton kernel against its reference, in Triton's interpreter.

Not collected by itself: TRITON_INTERPRET must be set before Triton is imported, so
test_triton.py runs this file in a process of its own.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton import jit

from engine import Engine, EngineConfig, Request, SamplingParams
from model import ops
from model.ops import cpu, reference, triton
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.triton import fused as fused_ops
from model.ops.triton import mxfp4, tiles
from model.ops.triton import sort_by_expert as grouping
from model.ops.triton.mxfp4 import unpack
from model.ops.triton.norm import swiglu
from model.ops.triton.tiles import Tile
from tests.checkpoints import quantize_mxfp4, write_checkpoint
from tests.model.test_ops import paged, rand
from tests.test_end_to_end import DATA
from tokenizer import Tokenizer

# Two bytes an element takes the tiles of real use; the interpreter multiplies no bfloat16.
DTYPES = [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(found: torch.Tensor, expected: torch.Tensor, slack: float = 1.0) -> None:
    tolerance = TOLERANCE[expected.dtype] * slack
    assert torch.isfinite(expected.float()).all()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 896, 2880])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_norm_and_residual(tokens: int, size: int, dtype: torch.dtype) -> None:
    x, delta = rand(tokens, size, dtype=dtype), rand(tokens, size, seed=1, dtype=dtype)
    weight = rand(size, seed=2, dtype=dtype)
    for change in (None, delta):
        summed, normed = triton.add_rms_norm(x, change, weight, 1e-5)
        expected_sum, expected = reference.add_rms_norm(x, change, weight, 1e-5)
        close(summed, expected_sum)  # the interpreter truncates to bfloat16
        close(normed, expected)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
@pytest.mark.parametrize("heads", [(4, 4), (7, 1), (6, 2)])
def test_rotary_norms_and_kv_write(heads: tuple[int, int], dim: int, norms: bool) -> None:
    tokens, (queries, kv_heads) = 5, heads
    qkv = rand(tokens, queries + 2 * kv_heads, dim)
    cos_sin = rand(tokens, dim, seed=1)
    weights = (rand(dim, seed=2), rand(dim, seed=3)) if norms else None
    slots = torch.tensor([9, 3, 4, 15, 12])
    expected_kv, found_kv = (torch.full((2, 4, 4, kv_heads, dim), 7.0) for _ in range(2))
    expected = reference.rotate_and_write(qkv, cos_sin, expected_kv, slots, queries, weights, 1e-5)
    found = triton.rotate_and_write(qkv, cos_sin, found_kv, slots, queries, weights, 1e-5)
    close(found, expected)
    close(found_kv, expected_kv)


def attend(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    window: int | None,
    sinks: bool,
    dtype: torch.dtype = torch.float32,
    block_size: int = 8,
) -> None:
    batch, group, blocks = paged(lengths, window, block_size)
    query = rand(sum(q for q, _ in lengths), heads[0], dim, dtype=dtype)
    kv = rand(2, blocks + 3, block_size, heads[1], dim, seed=1, dtype=dtype)
    kv[:, blocks:] = float("nan")
    # Behind a sequence's end and window, and in the blocks of nobody, there may be anything.
    for row, (count, context) in enumerate(lengths):
        if context % block_size:
            last = group.block_table[row, context // block_size]
            kv[:, last, context % block_size :] = float("nan")
        if window is not None:
            for at in range(max(0, context - count - window + 1)):
                kv[:, group.block_table[row, at // block_size], at % block_size] = float("nan")
    kv[:, 0] = 0
    column = rand(heads[0], seed=2, dtype=dtype) * 2 if sinks else None
    expected = reference.attention(query, kv, batch, group, column)
    close(triton.attention(query, kv, batch, group, column), expected)


MIXED = [(1, 50), (1, 17), (20, 20), (7, 40), (2, 2)]


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("heads", "sinks"), [((2, 2), True), ((6, 2), False), ((7, 1), True)])
@pytest.mark.parametrize("lengths", [[(1, 1)], [(1, 170), (1, 1), (1, 16)], [(70, 70)], MIXED])
def test_attention(
    lengths: list[tuple[int, int]], heads: tuple[int, int], window: int | None, sinks: bool
) -> None:
    attend(lengths, heads, 32, window, sinks)


@pytest.mark.parametrize("dim", [16, 64, 80, 128])
def test_attention_of_head_sizes(dim: int) -> None:
    attend(MIXED, (8, 2), dim, 24, True)
    attend(MIXED, (8, 2), dim, None, False, torch.float16, 16)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_splits_of_the_kv_count_a_sink_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    original = triton.attention.__globals__["splits_of"]

    def counted(*arguments: Any) -> int:
        used.append(original(*arguments))
        return int(used[-1])

    # Sixteen processors, so that some of these rows are split and some are not.
    monkeypatch.setitem(triton.attention.__globals__, "processors", lambda device: 16)
    monkeypatch.setitem(triton.attention.__globals__, "splits_of", counted)
    lengths = [(1, 300), (1, 40), (1, 1), (1, 33), (1, 129)][:rows]
    for sinks in (False, True):
        attend(lengths, (6, 2), 32, None, sinks)
        attend(lengths, (6, 2), 32, 100, sinks)
        attend(lengths, (6, 2), 32, 200, sinks)
    assert used == {1: [16, 1, 2], 2: [8, 1, 2], 5: [2, 1, 2]}[rows] * 2


def test_rows_that_only_fill_a_batch_attend_to_nothing() -> None:
    batch, group, blocks = paged([(1, 9), (1, 5)], None, 8)
    batch.seen[1] = 0
    query, kv = rand(2, 4, 32), rand(2, blocks, 8, 2, 32, seed=1)
    for sinks in (None, rand(4, seed=2)):
        out = triton.attention(query, kv, batch, group, sinks)
        assert not out[1].any()
        assert out[0].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, 7.0])
def test_swiglu(limit: float | None, dtype: torch.dtype) -> None:
    gate_up = rand(5, 2 * 96, dtype=dtype) * 6
    close(swiglu(gate_up, limit, 1.702), reference.swiglu(gate_up, limit, 1.702), 2)


@pytest.mark.parametrize(("after", "normalize"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("count", "top_k"), [(8, 2), (6, 3), (128, 8)])
def test_router(count: int, top_k: int, after: bool, normalize: bool) -> None:
    logits = rand(9, count)
    chosen, weights = triton.route(logits, top_k, after, normalize)
    expected, shares = reference.route(logits, top_k, after, normalize)
    assert torch.equal(chosen, expected)
    close(weights, shares)


def test_a_row_of_nan_is_routed_to_experts_that_exist() -> None:
    chosen, _ = triton.route(torch.full((1, 6), float("nan")), 3, True, False)
    assert chosen.min() >= 0
    assert chosen.max() < 6


@pytest.mark.parametrize("tokens", [1, 7, 64, 150])
def test_grouping_sorts_pairs_by_expert_and_keeps_their_order(tokens: int) -> None:
    chosen = torch.randint(0, 5, (tokens, 2), generator=torch.Generator().manual_seed(0))
    order, starts = grouping.group_by_expert(chosen, 0, 6)
    flat = chosen.flatten()
    assert order.tolist() == flat.argsort(stable=True).tolist()
    assert starts.tolist() == [int((flat < e).sum()) for e in range(7)]
    order, starts = grouping.group_by_expert(chosen, 1, 3)  # of 5
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
        (70, torch.float16, True, True, 16),  # 64 of each, and 6 that are left
    ],
)
def test_experts(
    tokens: int,
    dtype: torch.dtype,
    biases: bool,
    unbalanced: bool,
    short: int,
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = replace(tiles.tiles(torch.device("cpu")), short=short)
    monkeypatch.setitem(triton.experts.__globals__, "tiles", lambda device: own)
    count, hidden, size, top_k = 6, 96, 160, 2
    x = rand(tokens, hidden, dtype=dtype)
    logits = rand(tokens, count, seed=1)
    if unbalanced:  # everything to two experts, nothing to the others
        logits[:, 2:] -= 100
    chosen, shares = reference.route(logits, top_k, True, False)
    gate_up: Any = rand(count, 2 * size, hidden, seed=2, dtype=dtype) * 0.2
    down: Any = rand(count, hidden, size, seed=4, dtype=dtype) * 0.2
    wide_up, wide_down = gate_up.float(), down.float()
    if packed:
        gate_up, down = (reference.Mxfp4(*quantize_mxfp4(w)) for w in (gate_up, down))
        wide_up, wide_down = gate_up.dense(torch.float32), down.dense(torch.float32)
        gate_up, down = (triton.pack_experts(w, dtype) for w in (gate_up, down))
    up_bias = rand(count, 2 * size, seed=3, dtype=dtype) if biases else None
    down_bias = rand(count, hidden, seed=5, dtype=dtype) if biases else None
    form = (7.0, 1.702) if biases else (None, 1.0)
    found = triton.experts(x, chosen, shares, gate_up, up_bias, down, down_bias, *form)
    # The kernels add up in float32, so it is float32 that they are compared with.
    wide_biases = [None if b is None else b.float() for b in (up_bias, down_bias)]
    expected = reference.experts(
        x.float(), chosen, shares, wide_up, wide_biases[0], wide_down, wide_biases[1], *form
    )
    close(found, expected.to(dtype), 3)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("tokens", [1, 100])
def test_a_part_of_the_experts(tokens: int, rank: int) -> None:
    count, hidden, size = 6, 96, 160
    x, logits = rand(tokens, hidden), rand(tokens, count, seed=1)
    logits[:, 3 * rank] -= 100
    chosen, shares = reference.route(logits, 2, True, False)
    up, down = rand(3, 2 * size, hidden, seed=2) * 0.2, rand(3, hidden, size, seed=4) * 0.2
    rest = up, rand(3, 2 * size, seed=3), down, rand(3, hidden, seed=5), 7.0, 1.702, (rank, 2)
    expected = reference.experts(x, chosen, shares, *rest)
    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    try:
        close(triton.experts(x, chosen, shares, *rest), expected, 3)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_every_code_and_scale_of_mxfp4_is_unpacked_exactly(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the experts: weights that one-hot inputs read out, at usual and odd scales."""
    tile = Tile(128, 32, columns, 4, 1)  # high: one program unpacks for many rows
    monkeypatch.setitem(triton.experts.__globals__, "for_dtype", lambda *_: tile)
    size = 160  # five scales: more than a word has
    codes = torch.arange(256, dtype=torch.uint8).view(16, 1, 16)  # every pair of codes
    blocks = torch.cat([codes.roll(g, 0) for g in range(5)], 1).repeat(12, 1, 1)
    for exponent, kind in (
        (5, mxfp4.Words),
        (70, mxfp4.Words),
        (122, mxfp4.Words),
        (131, torch.Tensor),
    ):
        scales = exponent + torch.arange(192)[:, None] % 3 + torch.tensor([0, 4, -5, 1, 2])
        down = reference.Mxfp4(blocks[None], scales.byte()[None])
        gate_up = torch.zeros(1, 2 * size, size + 32)
        gate_up[0, :size, size] = 30  # which makes silu the identity; up is the one-hot input
        gate_up[0, size:, :size] = torch.eye(size)
        x = torch.cat((torch.eye(size), torch.ones(size, 32)), 1)
        zero, one = torch.zeros(size, 1, dtype=torch.int64), torch.ones(size, 1)
        packed = reference.Mxfp4(*quantize_mxfp4(gate_up))
        words = [triton.pack_experts(w, torch.float32) for w in (packed, down)]
        assert isinstance(words[1], kind)  # scales beyond 2 are not for the kernels
        found = triton.experts(x, zero, one, words[0], None, words[1], None, None, 1.0)
        gate = packed.dense(torch.float32)[0, 0, size]
        assert torch.equal(found, down.dense(torch.float32)[0].T * gate)


@jit
def unpacked(values_ptr, scales_ptr, out_ptr, K: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.arange(0, 16), tl.arange(0, K)
    words = tl.load(values_ptr + row[:, None] * (K // 8) + tl.arange(0, K // 8)[None, :])
    found = unpack(words, tl.load(scales_ptr + row), 0, "none", DTYPE)
    tl.store(out_ptr + row[:, None] * K + column[None, :], found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_is_unpacked_to_the_type_of_the_product(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(1, 1, 4, 1)
    weights = reference.Mxfp4(codes, torch.arange(65, 129, dtype=torch.uint8).view(1, 16, 4))
    words, out = mxfp4.pack(weights, dtype), torch.empty(16, 128, dtype=dtype)
    assert isinstance(words, mxfp4.Words)
    kind = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    unpacked[(1,)](words.values, words.scales, out, K=128, DTYPE=kind)
    assert torch.equal(out, weights.dense(dtype)[0])


ONE_ROW = tiles.Tile(1, 16, 32, 4, 3)


def fuse(monkeypatch: pytest.MonkeyPatch, **limits: Any) -> None:
    """Up to how many rows norms are in one kernel with what follows, as if it had been measured."""
    own = replace(tiles.tiles(torch.device("cpu")), **limits)
    for op in (triton.norm_qkv, triton.linear):
        monkeypatch.setitem(op.__globals__, "tiles", lambda device: own)
    # float16 stands for bfloat16, which the interpreter does not multiply.
    monkeypatch.setattr(fused_ops, "_overflows", lambda x: False)


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
        (5, None, (6, 2), 80, False, torch.float16),  # halves of 40 are no whole blocks
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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size, (queries, kv_heads) = 72, heads
    x, delta, norm = (rand(n, size, seed=i, dtype=dtype) for i, n in enumerate((rows, rows, 1)))
    out = (queries + 2 * kv_heads) * dim
    weight, bias = rand(out, size, seed=3, dtype=dtype) * 0.2, rand(out, seed=4, dtype=dtype)
    cos_sin = rand(rows, dim, seed=5)
    of_heads = (rand(dim, seed=6, dtype=dtype), rand(dim, seed=7, dtype=dtype)) if norms else None
    slots = torch.randperm(28, generator=torch.Generator().manual_seed(8))[:rows]
    fuse(monkeypatch, fused_qkv=17, one_row=one_row)
    for change, column in ((delta, bias), (delta, None), (None, bias)):
        kvs = [torch.full((2, 7, 4, kv_heads, dim), 7.0, dtype=dtype) for _ in range(2)]
        expected_sum, normed = reference.add_rms_norm(x, change, norm[0], 1e-5)
        qkv = reference.linear(normed, weight, column).unflatten(-1, (-1, dim))
        turn = slots, queries, of_heads
        expected = reference.rotate_and_write(qkv, cos_sin, kvs[0], *turn, 1e-5)
        found = triton.norm_qkv(x, change, norm[0], 1e-5, weight, column, cos_sin, kvs[1], *turn)
        assert found is not None
        assert torch.equal(found[0], expected_sum)
        close(found[1], expected, 3)
        close(kvs[1], kvs[0], 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "size"), [(4, 8), (37, 200), (300, 64)])
def test_one_row_times_a_weight(
    out: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse(monkeypatch, one_row=ONE_ROW)
    x, weight = rand(1, size, dtype=dtype), rand(out, size, seed=1, dtype=dtype)
    for bias in (None, rand(out, seed=2, dtype=dtype)):
        close(triton.linear(x, weight, bias), reference.linear(x, weight, bias))


@pytest.mark.parametrize(("rows", "one_row"), [(1, None), (1, ONE_ROW), (17, None)])
def test_norm_with_mlp(rows: int, one_row: Tile | None, monkeypatch: pytest.MonkeyPatch) -> None:
    size, inner = 112, 144
    x, delta, norm = rand(rows, size), rand(rows, size, seed=1), rand(size, seed=2)
    expected_sum, normed = reference.add_rms_norm(x, delta, norm, 1e-5)
    gate_up, down = rand(2 * inner, size, seed=5) * 0.2, rand(size, inner, seed=6) * 0.2
    for limit in ("fused_gate_up", "fused_mlp"):
        fuse(monkeypatch, one_row=one_row, **{limit: 17})
        for up_bias, down_bias in ((None, None), (rand(2 * inner, seed=7), rand(size, seed=8))):
            found = triton.norm_mlp(x, delta, norm, 1e-5, gate_up, up_bias, down, down_bias)
            if up_bias is not None and limit == "fused_mlp":
                assert found is None  # the kernel takes none
                continue
            assert found is not None
            assert torch.equal(found[0], expected_sum)
            inside = reference.swiglu(reference.linear(normed, gate_up, up_bias), None, 1.0)
            close(found[1], reference.linear(inside, down, down_bias), 5)


def test_nothing_is_fused_beyond_its_limit_nor_where_nobody_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, norm, weight = rand(5, 32), rand(32), rand(64, 32)
    rest = norm, 1e-5, weight, None
    turn: Any = (rand(5, 16), torch.zeros(2, 1, 5, 1, 16), torch.arange(5), 2, None)
    assert triton.norm_qkv(x, x, *rest, *turn) is None
    assert triton.norm_mlp(x, x, *rest, weight[:32], None) is None
    fuse(monkeypatch, fused_qkv=4, fused_gate_up=4, fused_mlp=4)
    assert triton.norm_qkv(x, x, *rest, *turn) is None
    assert triton.norm_mlp(x, x, *rest, weight[:32], None) is None


def test_what_may_not_fit_before_it_is_scaled_is_not_fused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overflows = fused_ops._overflows
    fuse(monkeypatch, fused_qkv=4, fused_gate_up=4, fused_mlp=4)
    monkeypatch.setattr(fused_ops, "_overflows", overflows)
    x, norm = rand(2, 32, dtype=torch.float16), rand(32, dtype=torch.float16)
    weight = rand(64, 32, dtype=torch.float16)
    assert triton.norm_mlp(x, x, norm, 1e-5, weight, None, weight.T[:, :32], None) is None


def test_a_model_with_its_norms_fused_gives_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name in ("norm_linear", "_mlp"):
        original = getattr(fused_ops, name)

        def counted(*given: Any, name: str = name, original: Any = original, **named: Any) -> Any:
            called.append(name)
            return original(*given, **named)

        monkeypatch.setattr(fused_ops, name, counted)
    checkpoint = write_checkpoint(tmp_path / "qwen2", "qwen2")
    fuse(monkeypatch, fused_qkv=4, fused_mlp=4, one_row=ONE_ROW)
    requests = [Request([5, 6, 7], SamplingParams(max_new_tokens=3, ignore_eos=True))]
    tokens = []
    for kernels in (cpu, triton):
        monkeypatch.setitem(ops._BY_DEVICE, "cpu", kernels)
        with Engine(checkpoint, EngineConfig(dtype="float32", kv_memory=1 << 20)) as engine:
            tokens.append([c.token_ids for c in engine.generate(requests)])
            layers = len(engine.model_config.layers)
    assert tokens[0] == tokens[1]
    assert Counter(called) == {"norm_linear": 3 * layers, "_mlp": 3 * layers}


def test_results_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    # On some processors NumPy's own sums depend on the number of rows.
    multiply = np.matmul
    monkeypatch.setattr(
        np, "matmul", lambda a, b, dtype: multiply(a, b, dtype=np.float64).astype(dtype)
    )
    count, hidden, size = 6, 64, 64
    gate_up = rand(count, 2 * size, hidden, seed=2) * 0.2
    down = rand(count, hidden, size, seed=4) * 0.2
    x = rand(40, hidden)
    chosen, shares = reference.route(rand(40, count, seed=1), 3, True, False)
    rest = (gate_up, None, down, None, None, 1.0)
    whole = triton.experts(x, chosen, shares, *rest)
    for row in (0, 17, 39):
        part = slice(row, row + 1)
        assert torch.equal(
            triton.experts(x[part], chosen[part], shares[part], *rest)[0], whole[row]
        )


def test_nothing_is_read_from_the_lists_of_a_batch() -> None:
    """A captured step is replayed with other tensors: only those may matter."""
    batch, group, blocks = paged([(1, 9), (5, 7)], None, 8)
    query, kv = rand(6, 4, 32), rand(2, blocks, 8, 2, 32, seed=1)
    expected = triton.attention(query, kv, batch, group, None)
    lists: Any = None
    stripped = ForwardBatch(**{**vars(batch), "query_lens": lists, "context_lens": lists})
    tables = GroupTables(None, group.block_table, group.slots)
    assert torch.equal(triton.attention(query, kv, stripped, tables, None), expected)


def test_the_model_of_the_repository_gives_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MXFP4 experts, sinks and windows through every kernel; a prompt longer than the window."""
    ids = Tokenizer.load(DATA / "model").encode("What is 17 plus 25? What is")
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    # Large tiles are fewer programs, and those are what takes the interpreter its time.
    large = Tile(16, 128, 128, 4, 1)
    monkeypatch.setitem(triton.experts.__globals__, "for_dtype", lambda tile, dtype: large)
    requests = [Request(ids, params, 0), Request(ids[:3], params, 1)]
    tokens = []
    for kernels in (cpu, triton):
        monkeypatch.setitem(ops._BY_DEVICE, "cpu", kernels)
        with Engine(DATA / "model", EngineConfig(dtype="float32", kv_memory=1 << 20)) as engine:
            found = {c.request_id: c.token_ids for c in engine.generate(requests)}
            tokens.append(found)
    assert tokens[0] == tokens[1]
