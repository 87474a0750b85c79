"""Products with the copies of bf16 weights in 12 bits: the same bits as without."""

from collections.abc import Iterator

import pytest
import torch

from model.ops.cpu.backend import CpuBackend
from model.ops.cpu.packed import Packed
from model.ops.specs import COMPRESSED_ROWS, Activation, Linear
from tests.model.emulator import native_level
from tests.model.ops_helpers import cpu_backend, experts_of, packed_experts, packed_linear, rand

ROWS = (*range(1, COMPRESSED_ROWS + 2), 30)
"""Numbers of rows that are multiplied with the copy, and two that are not."""


@pytest.fixture
def backend() -> Iterator[CpuBackend]:
    """A backend that makes copies."""
    with native_level("avx512"):
        backend = cpu_backend(torch.bfloat16)
        backend.allow_copies(1 << 30)
        yield backend


def weight_of(outputs: int, inputs: int) -> torch.Tensor:
    """Random values, among them zeros and some of very different magnitudes."""
    weight = rand(outputs, inputs) * 0.02
    weight[3] = 0
    weight[5, 7] = -1e6
    weight[6, ::31] = 1e-40  # subnormal
    weight[-1, -1] = 1e-20
    return weight.bfloat16()


def has_copy(linear: Linear) -> bool:
    """Whether a linear's weight has a compressed copy."""
    return isinstance(linear.weight, Packed) and linear.weight._compressed is not None


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(100, 160), (160, 896), (64, 1056), (4096, 256), (40, 4864)]
)
def test_products_have_the_same_bits(backend: CpuBackend, outputs: int, inputs: int) -> None:
    weight, bias = weight_of(outputs, inputs), rand(outputs, seed=1).bfloat16()
    compressed = packed_linear(backend, weight, bias)
    plain = packed_linear(cpu_backend(torch.bfloat16), weight, bias)
    backend.compress()
    assert has_copy(compressed)
    assert not has_copy(plain)
    for rows in ROWS:
        x = rand(rows, inputs, seed=rows).bfloat16()
        assert torch.equal(backend.linear(x, compressed), backend.linear(x, plain))
        assert torch.equal(backend.logits(x, compressed, 0.5), backend.logits(x, plain, 0.5))


def test_gated_products_have_the_same_bits(backend: CpuBackend) -> None:
    weight = weight_of(2 * 96, 288)
    compressed, plain = (packed_linear(b, weight) for b in (backend, cpu_backend(torch.bfloat16)))
    backend.compress()
    assert has_copy(compressed)
    for rows in ROWS:
        x = rand(rows, 288, seed=rows).bfloat16()
        found, wanted = (
            backend.gated_linear(x, each, Activation()) for each in (compressed, plain)
        )
        assert torch.equal(found, wanted)


def test_experts_have_the_same_bits(backend: CpuBackend) -> None:
    """Some of the experts have more rows than are multiplied with the copy, most have fewer."""
    up = torch.stack([weight_of(2 * 64, 160)] * 6)
    down = torch.stack([weight_of(160, 64)] * 6)
    experts = experts_of(up, None, down, None)
    compressed, plain = (packed_experts(b, experts) for b in (backend, cpu_backend(torch.bfloat16)))
    backend.compress()
    assert all(each._compressed is not None for each in (compressed.gate_up, compressed.down))
    for tokens in (1, 3, 40):
        x, shares = rand(tokens, 160).bfloat16(), rand(tokens, 2, seed=1).softmax(-1)
        chosen = torch.stack([torch.arange(tokens) % 5, torch.full((tokens,), 5)], dim=1)
        found, wanted = (
            backend.experts(x, chosen, shares, each, Activation()) for each in (compressed, plain)
        )
        assert torch.equal(found, wanted)


def test_experts_of_few_and_of_many_rows_do_not_disturb_each_other(backend: CpuBackend) -> None:
    """One thread computes all parts of `down`, each with both experts in turn."""
    up, down = (torch.stack([weight_of(*shape)] * 2) for shape in ((2 * 64, 160), (160, 64)))
    experts = experts_of(up, None, down, None)
    compressed, plain = (packed_experts(b, experts) for b in (backend, cpu_backend(torch.bfloat16)))
    backend.compress()
    x, shares = rand(40, 160).bfloat16(), torch.ones(40, 1)
    chosen = (torch.arange(40) >= 3).long().unsqueeze(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found, wanted = (
            backend.experts(x, chosen, shares, each, Activation()) for each in (compressed, plain)
        )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, wanted)


def test_copies_stay_within_the_memory_for_them(backend: CpuBackend) -> None:
    backend.allow_copies(64 * 256 * 3 // 2)
    first, second = (packed_linear(backend, rand(64, 256).bfloat16()) for _ in range(2))
    backend.compress()
    assert has_copy(first)
    assert not has_copy(second)
    assert backend.note_step(1) == 0.5
    assert backend.note_step(COMPRESSED_ROWS + 1) == 0


def test_copies_are_made_after_some_steps_of_few_rows(backend: CpuBackend) -> None:
    """A call that was recorded before reads them, too."""
    weight = rand(64, 256).bfloat16()
    layers = [packed_linear(backend, weight) for _ in range(3)]
    plain = packed_linear(cpu_backend(torch.bfloat16), weight)
    x = rand(2, 256).bfloat16()
    wanted = backend.linear(x, plain)
    assert torch.equal(backend.linear(x, layers[0]), wanted)  # before there is a copy
    described = layers[0].weight.described(None)
    assert not any(backend.note_step(rows) for rows in (0, COMPRESSED_ROWS + 1) * 100)
    assert not any(map(has_copy, layers))
    steps = 0
    while backend.note_step(1) < 1:
        steps += 1
    assert steps > 30
    assert all(map(has_copy, layers))
    assert layers[0].weight.described(None) == described
    assert torch.equal(backend.linear(x, layers[0]), wanted)
    layers[0].weight._compressed[0].zero_()
    assert not torch.equal(backend.linear(x, layers[0]), wanted)  # the copy is what is read


def test_weights_that_are_freed_need_no_copies(backend: CpuBackend) -> None:
    packed_linear(backend, rand(64, 256).bfloat16())
    kept = packed_linear(backend, rand(64, 256).bfloat16())
    backend.compress()
    assert has_copy(kept)


def test_without_memory_for_copies_steps_go_on(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = packed_linear(backend, rand(64, 256).bfloat16())

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("model.ops.cpu.packed.empty", fail)
    backend.compress()
    assert backend.note_step(1) == 0
    assert not has_copy(layer)


@pytest.mark.parametrize("value", [2.0**-30, float("inf"), float("nan")])
def test_weights_of_too_many_magnitudes_have_no_copy(backend: CpuBackend, value: float) -> None:
    weight = rand(64, 256)
    weight[:, ::100] = value
    layer, plain = (
        packed_linear(each, weight.bfloat16()) for each in (backend, cpu_backend(torch.bfloat16))
    )
    backend.compress()
    assert not has_copy(layer)
    x = rand(2, 256).bfloat16()
    found, wanted = (backend.linear(x, each) for each in (layer, plain))
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
