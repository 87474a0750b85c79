"""Every op's CPU form against the reference, over the shapes that break things."""

from typing import Any

import pytest
import torch

from model import ops
from model.batch import ForwardBatch, GroupTables
from model.ops import cpu, reference

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
        if window is not None:  # what lies behind the window has been given back
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
    return batch, GroupTables(window, table, empty), sum(blocks) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5, 16, 40])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1)],
        [(1, 33), (1, 1), (1, 16)],
        [(9, 9)],
        [(1, 50), (1, 17), (20, 20), (7, 40), (2, 2)],
    ],
)
def test_attention_equals_the_reference(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    window: int | None,
    sinks: bool,
    dtype: torch.dtype,
) -> None:
    batch, group, blocks = paged(lengths, window, block_size=8)
    query = rand(sum(q for q, _ in lengths), heads[0], 16, dtype=dtype)
    kv = rand(2, blocks, 8, heads[1], 16, seed=1, dtype=dtype)
    kv[:, 0] = 0
    # Behind a sequence's end and in blocks of nobody there may be anything.
    for row, (_, context) in enumerate(lengths):
        if context % 8:
            kv[:, group.block_table[row, context // 8], context % 8 :] = float("nan")
    column = rand(heads[0], seed=2, dtype=dtype) * 2 if sinks else None
    expected = reference.attention(query, kv, batch, group, column)
    found = cpu.attention(query, kv, batch, group, column)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_sink_takes_its_share_of_the_softmax() -> None:
    """The reference itself, by hand: one key, one sink, half of the weight each."""
    batch, group, blocks = paged([(1, 1)], None, block_size=4)
    kv = torch.ones(2, blocks, 4, 1, 16)
    query = torch.ones(1, 2, 16)
    score = 16 * 16**-0.5
    out = reference.attention(query, kv, batch, group, torch.tensor([score, -1e9]))
    torch.testing.assert_close(out[0, :, 0], torch.tensor([0.5, 1.0]))


def test_query_heads_share_the_kv_head_of_their_group() -> None:
    batch, group, blocks = paged([(1, 1)], None, block_size=4)
    kv = torch.zeros(2, blocks, 4, 2, 16)
    kv[1, :, :, 0], kv[1, :, :, 1] = 1.0, 2.0
    out = reference.attention(torch.ones(1, 6, 16), kv, batch, group, None)
    assert out[0, :, 0].tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("unbalanced", [False, True])
def test_experts_equal_the_reference(
    tokens: int, biases: bool, unbalanced: bool, dtype: torch.dtype
) -> None:
    count, hidden, size, top_k = 6, 32, 64, 2
    x = rand(tokens, hidden, dtype=dtype)
    logits = rand(tokens, count, seed=1)
    if unbalanced:  # everything to two experts, nothing to the others
        logits[:, 2:] -= 100
    chosen, shares = reference.route(logits, top_k, True, False)
    arguments: tuple[Any, ...] = (
        rand(count, 2 * size, hidden, seed=2, dtype=dtype) * 0.2,
        rand(count, 2 * size, seed=3, dtype=dtype) if biases else None,
        rand(count, hidden, size, seed=4, dtype=dtype) * 0.2,
        rand(count, hidden, seed=5, dtype=dtype) if biases else None,
        7.0 if biases else None,
        1.702,
    )
    expected = reference.experts(x, chosen, shares, *arguments)
    up, up_bias, down, *rest = arguments
    packed = (ops.pack_experts(up, dtype), up_bias, ops.pack_experts(down, dtype), *rest)
    found = ops.experts(x, chosen, shares, *packed)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 3, 32, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_linear_equals_the_plain_one(rows: int, bias: bool) -> None:
    x = rand(rows, 96, dtype=torch.bfloat16)
    weight = rand(160, 96, seed=1, dtype=torch.bfloat16)
    column = rand(160, seed=2, dtype=torch.bfloat16) if bias else None
    found = ops.linear(x, ops.pack(weight), column)
    torch.testing.assert_close(found, reference.linear(x, weight, column), rtol=2e-2, atol=2e-1)


def test_routers_weigh_as_their_families_do() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    shares = logits.softmax(-1)[0]
    experts, weights = ops.route(logits, 2, True, False)  # gpt-oss
    assert experts.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[3.0, 2.0]]).softmax(-1))
    _, weights = ops.route(logits, 2, False, True)  # Mixtral, Qwen3-MoE with norm_topk_prob
    torch.testing.assert_close(weights[0], shares[[1, 2]] / shares[[1, 2]].sum())
    _, weights = ops.route(logits, 2, False, False)  # Qwen3-MoE without
    torch.testing.assert_close(weights[0], shares[[1, 2]])


def test_gpt_oss_swiglu_clamps_gate_above_and_up_on_both_sides() -> None:
    gate = torch.tensor([[9.0, -9.0, 1.0]])
    up = torch.tensor([[-9.0, 9.0, 0.5]])
    found = ops.swiglu(torch.cat((gate, up), -1), 7.0, 1.702)
    clamped_gate, clamped_up = torch.tensor([[7.0, -9.0, 1.0]]), torch.tensor([[-7.0, 7.0, 0.5]])
    expected = clamped_gate * torch.sigmoid(1.702 * clamped_gate) * (clamped_up + 1)
    torch.testing.assert_close(found, expected)


def test_mxfp4_unpacks_low_nibble_first_with_power_of_two_scales() -> None:
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0] = 0x1 | (0xF << 4)  # 0.5, then -6
    blocks[0, 0, 15] = 0x7 | (0x8 << 4)  # 6, then -0
    dense = reference.dequantize_mxfp4(
        blocks, torch.tensor([[128]], dtype=torch.uint8), torch.float32
    )
    assert dense.shape == (1, 32)
    assert dense[0, :2].tolist() == [1.0, -12.0]
    assert dense[0, 30:].tolist() == [12.0, 0.0]
    tiny = reference.dequantize_mxfp4(blocks, torch.tensor([[0]], dtype=torch.uint8), torch.float32)
    assert float(tiny[0, 0]) == 2.0**-128
