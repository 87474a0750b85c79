"""Every op's CPU form against the reference, over the shapes that break things."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from model.ops.backend import Backend
from model.ops.cpu import backend as cpu
from model.ops.cpu import bindings as calls
from model.ops.cpu.packed import Packed
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.mxfp4 import Mxfp4, dequantize_mxfp4
from model.ops.specs import Activation, AttentionSpec, ExpertShard, RouterSpec
from tests.model.emulator import emulated_library
from tests.model.ops_helpers import (
    cpu_backend,
    experts_of,
    linear_of,
    norm_of,
    packed_experts,
    packed_linear,
    reference,
    rope_args,
)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(params=["float32", *(f"bfloat16-{level}" for level in calls.LEVELS)])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """Each dtype on each path: torch alone, and the kernels of each instruction set."""
    name, _, level = request.param.partition("-")
    if level in ("", "none"):
        monkeypatch.setattr(cpu, "library", lambda: None)
        yield getattr(torch, name)
        return
    with using(level):
        yield getattr(torch, name)


@contextmanager
def using(level: str) -> Iterator[None]:
    """The kernels of one instruction set, emulated where the processor has it not."""
    kernels, number = calls.library(), calls.LEVELS.index(level)
    if kernels is None:
        pytest.skip("no native kernels were built here")
    with pytest.MonkeyPatch.context() as patch:
        if not kernels.getp_has_level(number):
            kernels = emulated_library()
            if kernels is None:
                pytest.skip(f"this processor has no {level}, and it cannot be emulated")
            patch.setattr(calls, "library", lambda: kernels)
            patch.setattr(cpu, "library", lambda: kernels)
        usual = kernels.getp_level()
        kernels.getp_use_level(number)
        yield
        kernels.getp_use_level(usual)


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
    # Behind a sequence's end and in blocks of nobody there may be anything.
    for row, (_, context) in enumerate(lengths):
        if context % 8:
            kv[:, group.block_table[row, context // 8], context % 8 :] = float("nan")
    column = rand(heads[0], seed=2, dtype=dtype) * 2 if sinks else None
    spec = AttentionSpec(head_dim**-0.5, window)
    expected = reference(dtype).attention(query, kv, batch, group, spec, column)
    found = cpu_backend(dtype).attention(query, kv, batch, group, spec, column)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


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
    if unbalanced:  # everything to two experts, nothing to the others
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
def test_shares_of_experts_add_up_to_all(tokens: int, dtype: torch.dtype) -> None:
    count, hidden, size, ranks = 6, 32, 64, 3
    x, logits = rand(tokens, hidden, dtype=dtype), rand(tokens, count, seed=1)
    logits[:, 2:4] -= 100  # nothing to those of rank 1
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
    up, down = mxfp4(count, 2 * size, hidden), mxfp4(count, hidden, size)
    for weights in (up, down):
        # One scale below those that are told apart: what it scales is nil.
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


def test_an_mxfp4_scale_out_of_range_is_refused() -> None:
    if calls.library() is None:
        pytest.skip("no native kernels were built here")
    weights = Mxfp4(
        torch.zeros(1, 64, 1, 16, dtype=torch.uint8), torch.full((1, 64, 1), 251).to(torch.uint8)
    )
    with pytest.raises(ValueError, match="MXFP4 scale is above"):
        packed_experts(cpu_backend(torch.bfloat16), experts_of(weights, None, weights, None))


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("delta", [False, True])
def test_norm_with_residual_equals_the_reference(
    delta: bool, rows: int, dtype: torch.dtype
) -> None:
    x = rand(rows, 96, dtype=dtype)
    added = rand(rows, 96, seed=1, dtype=dtype) if delta else None
    norm = norm_of(rand(96, seed=2).to(dtype))
    expected = reference(dtype).add_rms_norm(x, added, norm)
    results = cpu_backend(dtype).add_rms_norm(x, added, norm)
    for found, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("head_dim", [16, 32, 128])
def test_rotary_with_kv_write_equals_the_reference(
    head_dim: int, norms: bool, dtype: torch.dtype
) -> None:
    tokens, heads, kv_heads = 7, 6, 2
    qkv = rand(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    angle = rand(tokens, head_dim // 2, seed=1)
    turn = torch.cat((angle.cos(), angle.sin()), -1)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:tokens]
    weights = None
    if norms:
        weights = rand(head_dim, seed=2, dtype=dtype), rand(head_dim, seed=3, dtype=dtype)
    mine, theirs = (torch.zeros(2, 5, 8, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    ours, plain = (rope_args(kv, turn, slots, heads, weights) for kv in (mine, theirs))
    found = cpu_backend(dtype).rotate_and_write(qkv, ours)
    expected = reference(dtype).rotate_and_write(qkv, plain)
    for one, other in ((found, expected), (mine, theirs)):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("rows", [0, 1, 9, 40])
@pytest.mark.parametrize("size", [48, 96])
def test_a_gated_linear_equals_the_reference(
    size: int, rows: int, limit: float | None, dtype: torch.dtype
) -> None:
    x, weight = rand(rows, 64, dtype=dtype), rand(2 * size, 64, seed=1, dtype=dtype)
    bias = rand(2 * size, seed=2, dtype=dtype)
    bias[:3] = torch.tensor([100.0, -100.0, 50.0])
    activation, backend = Activation(limit, 1.702), cpu_backend(dtype)
    wide = linear_of(weight.float(), bias.float())
    expected = reference().gated_linear(x.float(), wide, activation)
    found = backend.gated_linear(x, packed_linear(backend, weight, bias), activation)
    torch.testing.assert_close(found.float(), expected, rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize(("after", "normalize"), [(True, False), (False, True), (False, False)])
def test_routers_equal_the_reference(after: bool, normalize: bool, dtype: torch.dtype) -> None:
    logits = torch.stack([torch.randperm(16) for _ in range(9)]).to(dtype) / 4
    router = RouterSpec(4, after, normalize)
    expected = reference(dtype).route(logits, router)
    for found, wanted in zip(cpu_backend(dtype).route(logits, router), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["cpu", "triton"])
def test_backends_override_operations_with_the_signature_of_the_reference(kind: str) -> None:
    if kind == "triton":
        pytest.importorskip("triton")
    module = import_module(f"model.ops.{kind}.backend")
    backend = module.CpuBackend if kind == "cpu" else module.TritonBackend
    operations = [name for name in vars(Backend) if not name.startswith("_")]
    assert len(operations) > 15
    for name in operations:
        reference, own = (vars(Backend)[name], getattr(backend, name))
        if isinstance(reference, property):
            continue
        expected, found = (list(signature(f).parameters) for f in (reference, own))
        assert found == expected, name
        assert len(found) <= 8, f"{name} takes more than seven arguments"  # with self
    own_names = {n for n, v in vars(backend).items() if callable(v) and not n.startswith("_")}
    assert own_names <= set(operations)


def test_the_level_of_the_kernels_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(calls.VARIABLE, "none")
    assert calls.library.__wrapped__() is None
    monkeypatch.setenv(calls.VARIABLE, "sse")
    with pytest.raises(ValueError, match="must be none, avx2, vnni, avx512, amx, not 'sse'"):
        calls.library.__wrapped__()


def test_without_the_kernels_there_is_one_notice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(calls.VARIABLE, raising=False)
    monkeypatch.setattr(calls, "__file__", str(tmp_path / "native.py"))
    with pytest.warns(UserWarning, match="they were not built"):
        assert calls.library.__wrapped__() is None
    (tmp_path / "_kernels.so").write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="does not load"):
        assert calls.library.__wrapped__() is None


def test_the_kernels_are_those_of_the_running_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a checkout where several Pythons installed getp each built a file, maybe long ago."""
    monkeypatch.delenv(calls.VARIABLE, raising=False)
    monkeypatch.setattr(calls, "__file__", str(tmp_path / "calls.py"))
    (tmp_path / "_kernels.cpython-30-other.so").touch()
    with pytest.warns(UserWarning, match="they were not built"):
        assert calls.library.__wrapped__() is None
    # Like a library of older sources, this one loads and lacks functions.
    (tmp_path / f"_kernels{EXTENSION_SUFFIXES[0]}").symlink_to(torch._C.__file__)
    with pytest.warns(UserWarning, match=r"does not load .*getp_linear.*install again"):
        assert calls.library.__wrapped__() is None


@pytest.mark.parametrize("rows", [0, 1, 3, 12, 13, 17, 32, 47, 129, 700])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(160, 96), (8, 96), (72, 608), (64, 3040)])
def test_a_packed_linear_equals_the_plain_one(
    outputs: int, inputs: int, rows: int, bias: bool, dtype: torch.dtype
) -> None:
    x = rand(rows, inputs, dtype=dtype)
    weight = rand(outputs, inputs, seed=1, dtype=dtype) * (96 / inputs) ** 0.5
    column = rand(outputs, seed=2, dtype=dtype) if bias else None
    backend, plain = cpu_backend(dtype), reference(dtype)
    found = backend.linear(x, packed_linear(backend, weight, column))
    expected = plain.linear(x, linear_of(weight, column))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-1)


def test_without_kernels_nor_onednns_bfloat16_linears_are_torchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A processor without AVX-512, and no compiler when getp was installed."""
    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    x, weight = (rand(rows, 64, seed=rows, dtype=torch.bfloat16) for rows in (3, 32))
    backend = cpu_backend(torch.bfloat16)
    packed = packed_linear(backend, weight)
    assert isinstance(packed.weight, torch.Tensor)
    assert not packed.weight.is_mkldnn
    expected = reference(torch.bfloat16).linear(x, linear_of(weight))
    torch.testing.assert_close(backend.linear(x, packed), expected)
    monkeypatch.setenv(calls.VARIABLE, "")
    monkeypatch.setattr(calls, "EXTENSION_SUFFIXES", [])
    calls.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="--dtype float32 is then faster"):
            calls.library()
    finally:
        calls.library.cache_clear()


def test_recordings_of_many_sizes_share_their_memory() -> None:
    backend = cpu_backend(torch.bfloat16)
    recorder: Any = backend.recorder()
    if recorder is None:
        pytest.skip("no native kernels were built here")
    weights = [rand(64, 64, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    layers = [packed_linear(backend, weight) for weight in weights]
    x = rand(40, 64, seed=3, dtype=torch.bfloat16)

    def compute(rows: int) -> torch.Tensor:
        inner = x[:rows]
        for layer in layers:
            inner = backend.linear(inner, layer)
        return inner

    replays = {}
    for rows in range(40, 0, -1):
        replays[rows] = recorder(partial(compute, rows))
        replays[rows]()  # what was computed as it was recorded
    for rows, replay in replays.items():
        torch.testing.assert_close(replay(), compute(rows), rtol=0, atol=0)
    assert len(recorder._buffers) <= 4


def test_routers_weigh_as_their_families_do() -> None:
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


@pytest.fixture
def fixed_point() -> Iterator[None]:
    """The kernels that multiply integers."""
    with using("vnni"):
        yield


@pytest.mark.parametrize("inputs", [64, 96, 928])
@pytest.mark.parametrize("large", [1.0, 100.0, 1e8])
@pytest.mark.parametrize("octaves", [0, 30])
@pytest.mark.usefixtures("fixed_point")
def test_fixed_point_loses_no_more_than_it_says(inputs: int, large: float, octaves: int) -> None:
    """Also where one input is large, and where every group of 64 has a size of its own."""
    x, weight = rand(70, inputs), rand(96, inputs, seed=1)
    x[:, 5] *= large
    size = (torch.arange(inputs) // 64 % 3 - 1) * octaves
    x, weight = (x * 2.0**-size).bfloat16(), (weight * 2.0**size).bfloat16()
    exact = (x.double() @ weight.double().T).bfloat16().double()
    backend = cpu_backend(torch.bfloat16)
    found = backend.linear(x, packed_linear(backend, weight)).double()
    norms = [torch.stack([g.double().norm(dim=1) for g in m.split(64, 1)], 1) for m in (x, weight)]
    bound = norms[0] @ norms[1].T * 2.0**-11 + exact.abs() * 2.0**-7  # the last bit of bfloat16
    assert bool(((found - exact).abs() <= bound).all())
    if large == 1:  # much less than the results' own rounding
        assert float((found != exact).double().mean()) < 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.usefixtures("fixed_point")
def test_what_is_no_number_stays_none_in_fixed_point(value: float) -> None:
    backend = cpu_backend(torch.bfloat16)
    x, weight = rand(3, 96).bfloat16(), packed_linear(backend, rand(32, 96, seed=1).bfloat16())
    good = backend.linear(x, weight)
    x[1, 70] = value
    found = backend.linear(x, weight)
    assert not bool(found[1].isfinite().any())
    assert torch.equal(found[0], good[0])
    assert torch.equal(found[2], good[2])


@pytest.mark.parametrize("inputs", [32, 96, 320])
def test_rows_times_mxfp4_do_not_depend_on_their_number(inputs: int, dtype: torch.dtype) -> None:
    """With neighbouring scales up to twelve octaves apart, which one form or another might lose."""
    backend = cpu_backend(dtype)
    stack: Any = backend.empty_mxfp4((1, 64, inputs))
    if not isinstance(stack, Packed):
        pytest.skip("no kernel reads MXFP4 here")
    weight: Any = stack[0]
    weight[:64].copy_(mxfp4(1, 64, inputs, octaves=12)[0])
    x = rand(30, inputs, dtype=dtype)
    layer = linear_of(weight)
    together = backend.linear(x, layer)
    for rows in range(1, 30):
        assert torch.equal(backend.linear(x[:rows].contiguous(), layer), together[:rows])


def mxfp4(count: int, outputs: int, inputs: int, octaves: int = 6) -> Mxfp4:
    """Random codes with scales over some octaves."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, outputs, inputs // 32)
    blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 118 + octaves, shape, dtype=torch.uint8, generator=generator)
    return Mxfp4(blocks, scales)
