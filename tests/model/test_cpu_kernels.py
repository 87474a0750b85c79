"""Weight layout and matrix products of the native CPU kernels, for each instruction set."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model.ops.cpu.bindings import library
from model.ops.cpu.packed import Packed
from model.ops.mxfp4 import Mxfp4
from tests.model.emulator import native_level
from tests.model.ops_helpers import (
    cpu_backend,
    experts_of,
    linear_of,
    packed_experts,
    packed_linear,
    rand,
    random_mxfp4,
    reference,
)


@pytest.mark.parametrize("rows", [0, 1, 3, 12, 13, 17, 32, 47, 129, 700])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(160, 96), (8, 96), (72, 608), (64, 3040)])
def test_a_packed_linear_equals_the_reference(
    outputs: int, inputs: int, rows: int, bias: bool, dtype: torch.dtype
) -> None:
    x = rand(rows, inputs, dtype=dtype)
    weight = rand(outputs, inputs, seed=1, dtype=dtype) * (96 / inputs) ** 0.5
    column = rand(outputs, seed=2, dtype=dtype) if bias else None
    backend, plain = cpu_backend(dtype), reference(dtype)
    found = backend.linear(x, packed_linear(backend, weight, column))
    expected = plain.linear(x, linear_of(weight, column))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-1)


@pytest.fixture
def int16_kernels() -> Iterator[None]:
    """The kernels that multiply 16-bit integers with AVX-512."""
    with native_level("vnni"):
        yield


@pytest.mark.parametrize("inputs", [64, 96, 928])
@pytest.mark.parametrize("large", [1.0, 100.0, 1e8])
@pytest.mark.parametrize("octaves", [0, 30])
@pytest.mark.usefixtures("int16_kernels")
def test_int16_products_are_as_exact_as_documented(inputs: int, large: float, octaves: int) -> None:
    """Also if one input is large, and if the groups of 64 inputs differ in magnitude."""
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
    if large == 1:  # far less error than the rounding of the results
        assert float((found != exact).double().mean()) < 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.usefixtures("int16_kernels")
def test_rows_that_are_not_finite_give_no_finite_int16_products(value: float) -> None:
    backend = cpu_backend(torch.bfloat16)
    x, weight = rand(3, 96).bfloat16(), packed_linear(backend, rand(32, 96, seed=1).bfloat16())
    good = backend.linear(x, weight)
    x[1, 70] = value
    found = backend.linear(x, weight)
    assert not bool(found[1].isfinite().any())
    assert torch.equal(found[0], good[0])
    assert torch.equal(found[2], good[2])


@pytest.mark.parametrize("inputs", [32, 96, 320])
def test_mxfp4_products_do_not_depend_on_the_number_of_rows(
    inputs: int, dtype: torch.dtype
) -> None:
    """With adjacent scales up to twelve octaves apart, more than a common scale can represent."""
    backend = cpu_backend(dtype)
    stack: Any = backend.empty_mxfp4((1, 64, inputs))
    if not isinstance(stack, Packed):
        pytest.skip("no kernel reads MXFP4 here")
    weight: Any = stack[0]
    weight[:64].copy_(random_mxfp4(1, 64, inputs, octaves=12)[0])
    x = rand(30, inputs, dtype=dtype)
    layer = linear_of(weight)
    together = backend.linear(x, layer)
    for rows in range(1, 30):
        assert torch.equal(backend.linear(x[:rows].contiguous(), layer), together[:rows])


def test_an_mxfp4_scale_out_of_range_is_refused() -> None:
    if library() is None:
        pytest.skip("the native kernels were not built here")
    weights = Mxfp4(
        torch.zeros(1, 64, 1, 16, dtype=torch.uint8), torch.full((1, 64, 1), 251).to(torch.uint8)
    )
    with pytest.raises(ValueError, match="MXFP4 scale is above"):
        packed_experts(cpu_backend(torch.bfloat16), experts_of(weights, None, weights, None))
