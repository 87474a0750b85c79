"""Compare products with weights of 4 and 8 bits with the reference, in Triton's interpreter.

pytest does not collect this file by its name: test_triton.py runs it in a separate process.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from model import load_config
from model.checks import cases, problem
from model.formats.float8 import FP8, Float8
from model.formats.integers import Integers
from model.ops.backend import Backend
from model.ops.specs import Activation, Experts, Linear, RouterSpec
from model.ops.triton.backend import TritonBackend
from model.ops.triton.quantized.linear import quantized_rows
from model.ops.triton.quantized.weights import QuantizedWeight
from model.ops.triton.tiles import target_of
from tests.checkpoints import write_checkpoint
from tests.model.ops_helpers import CPU, rand, reference

KERNELS = TritonBackend(CPU, torch.float32)
REFERENCE = reference()
INTEGERS: list[Any] = [
    Integers(bits, group, zeros, quantizes=False)
    for bits, group, zeros in ((4, 32, True), (4, 128, False), (4, 0, True), (8, 64, False))
] + [Integers(8, 0, False, quantizes=False), Integers(8, 32, True, quantizes=False)]
UNROUNDED: list[Any] = [Float8(), Float8(32)]
ROUNDED: list[Any] = [FP8, Float8(128, "dynamic"), Float8(0, "static")]


@pytest.fixture(autouse=True)
def nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round to e4m3 as GPUs do; its own code can halve a number."""
    original = interpreter._convert_float

    def convert(values: Any, kind: Any, wanted: Any, mode: Any) -> Any:
        found = {"fp8e4nv": torch.float8_e4m3fn, "fp8e4b8": torch.float8_e4m3fnuz}.get(wanted.name)
        if found is None or kind.name != "fp32":
            return original(values, kind, wanted, mode)
        return torch.tensor(values).to(found).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def filled(form: Any, shape: tuple[int, ...], backend: Backend = KERNELS) -> tuple[Any, Any]:
    """A random weight as the reference and as a backend keep it, filled in two parts."""
    source = form.allocate(REFERENCE, shape)
    form.fill_random(source, torch.Generator().manual_seed(0))
    storage = form.allocate(backend, shape)
    for expert in range(shape[0]) if len(shape) == 3 else [None]:
        own, other = (source, storage) if expert is None else (source[expert], storage[expert])
        for first, last in ((0, 7), (7, shape[-2])):
            other[first:last].copy_(own[first:last])
    return source, form.finish(backend, storage)


def close(found: torch.Tensor, expected: torch.Tensor, error: float = 1e-5) -> None:
    assert found.isfinite().all()
    assert float((found - expected).abs().max()) <= error * float(expected.abs().max())


@pytest.mark.parametrize("run", [2, 4, 8])
@pytest.mark.parametrize("form", INTEGERS + UNROUNDED, ids=str)
def test_storage_has_the_values_of_its_source(form: Any, run: int) -> None:
    target = replace(target_of(CPU), architecture={2: "sm_90", 4: "sm_80", 8: "gfx950"}[run])
    source, weight = filled(form, (24, 256), TritonBackend(CPU, torch.float32, target))
    assert (weight.run, weight.group) == (run, form.group or 256)
    close(weight.dense(torch.float32), source.dense(torch.float32), 1e-6)


@pytest.mark.parametrize(("form", "rows"), [(form, 3) for form in INTEGERS + UNROUNDED], ids=str)
def test_linears(form: Any, rows: int) -> None:
    source, weight = filled(form, (24, 256))
    layer = Linear(256, 24, True, form, weight=weight, bias=rand(24, seed=2))
    x = rand(rows, 256, seed=1)
    expected = REFERENCE.linear(x, replace(layer, weight=source))
    close(KERNELS.linear(x, layer), expected)
    close(KERNELS.logits(x, layer, 2.0), REFERENCE.logits(x, replace(layer, weight=source), 2.0))


@pytest.mark.parametrize("group", [32, 0])
def test_float16_is_multiplied_as_bfloat16_would_be(group: int) -> None:
    """With tiles for 16 bits; integers are exact in both, so only the result is rounded."""
    form, ops = Integers(4, group, True, quantizes=False), TritonBackend(CPU, torch.float16)
    source, weight = filled(form, (72, 192), ops)
    x = rand(70, 192, dtype=torch.float16)
    layer = Linear(192, 72, False, form, weight=weight)
    expected = REFERENCE.linear(x.float(), replace(layer, weight=source))
    close(ops.linear(x, layer).float(), expected, 2e-3)


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_e4m3_has_the_form_of_the_hardware(architecture: str) -> None:
    target = replace(target_of(CPU), architecture=architecture)
    source, weight = filled(FP8, (24, 64), TritonBackend(CPU, torch.float32, target))
    assert weight.codes.dtype == target.fp8
    close(weight.dense(torch.float32), source.dense(torch.float32), 1e-6)


@pytest.mark.parametrize("form", ROUNDED, ids=str)
def test_inputs_and_weights_in_e4m3(form: Any) -> None:
    source, weight = filled(form, (40, 256))
    x = rand(20, 256, seed=1)
    if form.inputs == "static":  # a scale so small that some values saturate
        weight = replace(weight, input_scale=torch.tensor([0.01]))
    codes, scales = quantized_rows(x, weight, KERNELS.target)
    limit = torch.finfo(weight.codes.dtype).max
    groups = x.unflatten(1, (-1, weight.group))
    if form.inputs == "static":
        assert (scales == 0.01).all()
    else:
        torch.testing.assert_close(scales, groups.abs().amax(-1) / limit)
    rounded = codes.float().unflatten(1, (-1, weight.group)) * scales.unsqueeze(-1)
    wanted = groups.clamp(-limit * scales.unsqueeze(-1), limit * scales.unsqueeze(-1))
    steps = wanted.abs() / 16 + 2**-9 * scales.unsqueeze(-1)
    assert ((rounded - wanted).abs() <= steps).all()
    layer = Linear(256, 40, False, form, weight=weight)
    expected = rounded.flatten(1) @ source.dense(torch.float32).T
    close(KERNELS.linear(x, layer), expected)


def test_rows_of_zeros_give_zeros() -> None:
    _, weight = filled(FP8, (16, 64))
    layer = Linear(64, 16, False, FP8, weight=weight)
    assert not KERNELS.linear(torch.zeros(3, 64), layer).any()
    assert KERNELS.linear(torch.zeros(0, 64), layer).shape == (0, 16)


@pytest.mark.parametrize(
    ("form", "tokens", "has_bias"),
    [(INTEGERS[0], 8, True), (INTEGERS[4], 1, False), (Float8(128, "dynamic"), 20, False)],
    ids=str,
)
def test_experts(form: Any, tokens: int, has_bias: bool) -> None:
    count, hidden, size, activation = 3, 128, 128, Activation()
    weights = [filled(form, shape) for shape in ((count, 2 * size, hidden), (count, hidden, size))]
    biases = [rand(count, width, seed=3) if has_bias else None for width in (2 * size, hidden)]

    def experts(index: int) -> Experts:
        up, down = (pair[index] for pair in weights)
        return Experts(count, hidden, size, has_bias, form, up, biases[0], down, biases[1])

    assert isinstance(experts(1).down, QuantizedWeight)
    x, logits = rand(tokens, hidden), rand(tokens, count, seed=1)
    logits[:, 1] -= 100  # an expert without rows
    chosen, shares = REFERENCE.route(logits, RouterSpec(2, True, False))
    expected = REFERENCE.experts(x, chosen, shares, experts(0), activation)
    found = KERNELS.experts(x, chosen, shares, experts(1), activation)
    close(found, expected, 0.08 if getattr(form, "inputs", "") else 1e-5)


def test_a_shape_that_kernels_do_not_take_becomes_dense() -> None:
    for form, inputs in ((INTEGERS[1], 80), (INTEGERS[2], 40), (FP8, 40)):
        assert isinstance(form.allocate(KERNELS, (8, inputs)), torch.Tensor)


def test_values_that_the_layout_cannot_hold_are_refused() -> None:
    for form, value in ((FP8, float("nan")), (FP8, float("inf"))):
        values = rand(8, 64)
        values[2, 3] = value
        with pytest.raises(ValueError, match="not finite"):
            form.allocate(KERNELS, (8, 64)).copy_(values)
    source, _ = filled(INTEGERS[0], (8, 64))
    source.scales[3, 1] = 20
    with pytest.raises(ValueError, match="not below 16"):
        INTEGERS[0].allocate(KERNELS, (8, 64)).copy_(source)
    with pytest.raises(ValueError, match="zero points are stored"):
        replace(INTEGERS[0], has_zeros=False).allocate(KERNELS, (8, 64)).copy_(source)


def test_weights_of_16_bits_become_e4m3_reproducibly() -> None:
    values = rand(24, 96).bfloat16()
    weights: list[Any] = [FP8.allocate(backend, (24, 96)) for backend in (REFERENCE, KERNELS)]
    for weight in weights:
        weight[0:10].copy_(values[0:10])
        weight[10:24].copy_(values[10:24])
    dense = [weight.dense(torch.float32) for weight in weights]
    assert torch.equal(*dense)
    assert ((dense[0] - values.float()).abs() <= values.float().abs() / 16 + 1e-4).all()


def test_kernels_pass_their_checks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama-llama3-rope")
    config = load_config(tmp_path).quantized("fp8").held(KERNELS)
    found = list(cases(config, CPU, torch.float32, operations=("linear",)))
    assert any(case.tolerance for case in found)
    assert [str(case) for case in found if problem(case, KERNELS, REFERENCE)] == []
