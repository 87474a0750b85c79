"""Weights of 8 and 4 bits on a CPU: their products for each instruction set, and quantization."""

from typing import Any

import pytest
import torch

from model.formats.integers import INT4, INT8, Integers
from model.ops.cpu.bindings import library
from model.ops.cpu.packed import Packed, quantize, rotate
from model.ops.quantized import GroupedInt
from model.ops.specs import Activation
from tests.model.ops_helpers import cpu_backend, experts_of, linear_of, rand, reference

FORMS = [
    Integers(bits, group, has_zeros, rows)
    for bits in (8, 4)
    for group, has_zeros, rows in ((32, False, "8"), (64, True, "16"), (0, False, "16"))
]


def integers(form: Integers, outputs: int, inputs: int) -> GroupedInt:
    """Random integers, with scales that are exact as float16, as a checkpoint may store them."""
    torch.manual_seed(form.bits)
    first, last = (0, 16) if form.bits == 4 else (-128, 128)
    codes = torch.randint(first, last, (outputs, inputs), dtype=torch.int8)
    scales = (
        torch.rand(outputs, inputs // form.group_of(inputs)) + 0.1
    ).half().float() / 128  # exact as the kernels store them
    zeros = torch.full_like(scales, 0 if form.bits == 8 else -8)
    if form.has_zeros:
        zeros += torch.randint(-8, 8, scales.shape)
    return GroupedInt(form.bits, codes, scales, zeros * scales)


def stored(dtype: torch.dtype, source: GroupedInt, form: Integers) -> Packed:
    """The integers in the layout of the kernels, filled in two parts. Skips without kernels."""
    backend = cpu_backend(dtype)
    if not backend.keeps_integers(quantizes=True):
        pytest.skip("no kernel reads integers here")
    weight: Any = form.allocate(backend, source.shape)
    weight[:40].copy_(source[:40])
    weight[40 : len(source)].copy_(source[40:])
    packed: Packed = form.finish(backend, weight)
    return packed


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def rounded(values: torch.Tensor, form: Integers) -> torch.Tensor:
    """The values in float32 that weights have after they were quantized."""
    group = form.group_of(values.shape[-1])
    found = quantize(values, form.bits, group, form.rows).dense(torch.float32)
    # Values are rotated back with the transposed matrix of the rotation.
    return found @ rotate(torch.eye(group), group).T if form.rows == "rotated 8" else found


def rows_of_8_bits(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that 8-bit integers with a scale for each 32 represent exactly.

    The sum of two neighbours is not larger than they are, as AVX2 needs it.
    """
    codes = torch.randint(-127, 128, (rows, inputs))
    codes[:, ::32] = 127
    codes[:, 1::2] = codes[:, 1::2].abs() * -codes[:, ::2].sign()
    return (codes * 2.0**-6).to(dtype)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_products_of_8_bits_fit_their_sums(sign: int, dtype: torch.dtype) -> None:
    """AVX2 adds two of them in 16 bits."""
    form = Integers(8, 64)
    codes = torch.full((32, 64), 127, dtype=torch.int8)
    weight = stored(dtype, GroupedInt(8, codes, torch.full((32, 1), 2.0**-7), None), form)
    found = cpu_backend(dtype).linear(torch.full((3, 64), sign, dtype=dtype), linear_of(weight))
    torch.testing.assert_close(found.float(), torch.full((3, 32), sign * 63.5), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 70])
def test_products_are_exact_where_rows_are(form: Integers, rows: int, dtype: torch.dtype) -> None:
    source = integers(form, 72, 192)
    weight = stored(dtype, source, form)
    x, bias = rows_of_8_bits(rows, 192, dtype), rand(72, seed=2, dtype=dtype)
    found = cpu_backend(dtype).linear(x, linear_of(weight, bias)).float()
    expected = x.float() @ source.dense(torch.float32).T + bias.float()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2e-3)  # bfloat16's last bit


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_are_rounded_to_their_bits(form: Integers, dtype: torch.dtype) -> None:
    """Each value is off by at most half a step of its group, and a little more in ties."""
    source = integers(form, 72, 192)
    weight, x = stored(dtype, source, form), rand(9, 192, dtype=dtype)
    x[:, 40] *= 50  # one value that is much larger than the others of its group
    found = cpu_backend(dtype).linear(x, linear_of(weight)).float()
    dense = source.dense(torch.float32)
    size, largest = (32, 127) if form.rows == "8" else (64, 32639)
    steps = x.float().unflatten(-1, (-1, size)).abs().amax(-1) / largest
    bound = 0.51 * steps @ dense.unflatten(-1, (-1, size)).abs().sum(-1).T
    exact = x.float() @ dense.T
    assert ((found - exact).abs() <= bound + exact.abs() * 2**-8).all()


def test_a_rotation_spreads_the_largest_values(dtype: torch.dtype) -> None:
    """With 8 bits, one large value takes the bits of the others of its group."""
    values, x = rand(64, 640), rand(9, 640, dtype=dtype)
    x[:, 40] *= 50
    errors = []
    for form in (INT8, Integers(8, 64)):
        weight: Any = form.allocate(cpu_backend(dtype), values.shape)
        if not isinstance(weight, Packed):
            pytest.skip("no kernel reads integers here")
        weight.copy_(values)
        found = cpu_backend(dtype).linear(x, linear_of(weight))
        errors.append(relative_error(found, x.float() @ rounded(values, form).T))
    assert errors[0] < max(0.004, errors[1] / 2)


@pytest.mark.parametrize("form", [INT8, INT4, *FORMS], ids=str)
def test_products_do_not_depend_on_the_number_of_rows(form: Integers, dtype: torch.dtype) -> None:
    backend = cpu_backend(dtype)
    layer = linear_of(stored(dtype, integers(form, 96, 640), form), rand(96, dtype=dtype))
    x = rand(45, 640, dtype=dtype)
    together = backend.logits(x, layer, 1.0)  # in float32: nothing is hidden by rounding
    for rows in range(1, 45):
        assert torch.equal(backend.logits(x[:rows].contiguous(), layer, 1.0), together[:rows])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_rows_that_are_not_finite_give_no_finite_products(value: float, dtype: torch.dtype) -> None:
    backend, layer = cpu_backend(dtype), linear_of(stored(dtype, integers(INT8, 64, 96), INT8))
    x = rand(3, 96, dtype=dtype)
    good = backend.linear(x, layer)
    x[1, 70] = value
    found = backend.linear(x, layer)
    assert not bool(found[1].isfinite().any())
    assert torch.equal(found[::2], good[::2])


@pytest.mark.parametrize("form", [INT8, INT4], ids=str)
def test_gated_linears_and_experts_take_integers(form: Integers, dtype: torch.dtype) -> None:
    backend, plain, activation = cpu_backend(dtype), reference(dtype), Activation()
    up, down = (rand(4, *shape, seed=i) / 8 for i, shape in enumerate(((128, 96), (96, 64))))
    layers: list[Any] = []
    for parts, weights in ((2, up), (1, down)):
        storage: Any = form.allocate(backend, tuple(weights.shape), parts)
        if not isinstance(storage, Packed):
            pytest.skip("no kernel reads integers here")
        for expert, weight in enumerate(weights):
            rows: Any = storage[expert]
            rows[0 : len(weight)].copy_(weight)
        layers.append(form.finish(backend, storage))
    x, chosen = rand(19, 96, dtype=dtype), torch.randint(0, 4, (19, 2))
    shares = rand(19, 2, seed=5).softmax(-1)
    dense = [
        torch.stack([rounded(weight, form).to(dtype) for weight in weights])
        for weights in (up, down)
    ]
    experts = experts_of(dense[0], None, dense[1], None)
    expected = plain.experts(x, chosen, shares, experts, activation)
    experts.gate_up, experts.down = layers
    found = backend.experts(x, chosen, shares, experts, activation)
    assert relative_error(found, expected) < 0.02  # rows are rounded to 8 bits
    gated = backend.gated_linear(x, linear_of(layers[0][1]), activation)
    expected = plain.gated_linear(x, linear_of(dense[0][1]), activation)
    assert relative_error(gated, expected) < 0.02


@pytest.fixture
def native() -> None:
    """Skips where the native kernels were not built."""
    if library() is None:
        pytest.skip("the native kernels were not built here")


@pytest.mark.parametrize(("form", "error"), [(INT8, 0.0077), (INT4, 0.073)], ids=str)
@pytest.mark.usefixtures("native")
def test_quantization_searches_for_the_scale_with_the_least_error(
    form: Integers, error: float
) -> None:
    """Scales from the ends of the range have an error of 0.0078 and 0.078 on normal numbers."""
    torch.manual_seed(0)
    values = torch.randn(64, 896)
    assert relative_error(rounded(values, form), values) < error
    found = quantize(values, form.bits, form.group_of(896), form.rows)
    again = quantize(values.clone(), form.bits, form.group_of(896), form.rows)
    assert torch.equal(found.codes, again.codes)
    assert torch.equal(found.scales, again.scales)


@pytest.mark.parametrize("form", [INT8, INT4], ids=str)
@pytest.mark.parametrize("spread", [0.0, 1e-3])
@pytest.mark.usefixtures("native")
def test_equal_and_nearly_equal_values_keep_their_size(form: Integers, spread: float) -> None:
    values = torch.cat((torch.zeros(1, 32), 3 + spread * rand(1, 32), -3 + spread * rand(1, 32)))
    torch.testing.assert_close(rounded(values, form), values, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("form", [INT8, INT4], ids=str)
@pytest.mark.usefixtures("native")
def test_storage_has_the_declared_bytes_and_the_values_of_its_source(form: Integers) -> None:
    values = rand(64, 320)
    weight: Any = form.allocate(cpu_backend(torch.bfloat16), (64, 320))
    weight.copy_(values)
    parts = [part for part in (weight.data, weight.scales, weight.zeros) if part is not None]
    assert sum(part.nbytes for part in parts) == form.bytes((64, 320), 2)
    x = torch.eye(320)
    if form == INT8:  # rows of which one value is left after the kernel's rotation lose half a step
        x = rotate(x, 320).T.contiguous()
    found = cpu_backend(torch.bfloat16).linear(x.bfloat16(), linear_of(weight)).float().T
    torch.testing.assert_close(found, rounded(values, form) @ x.T, rtol=2**-7, atol=1e-6)


@pytest.mark.usefixtures("native")
def test_values_that_are_nearly_their_offset_are_kept() -> None:
    """GGUF's Q4_1 stores a group of equal values with a scale of 0."""
    form = Integers(4, 32, has_zeros=True, rows="16", quantizes=False)
    source = integers(form, 32, 64)
    assert source.offsets is not None
    source.scales[3] = 0.0
    source.offsets[3] = 0.5
    source.scales[4] = 2.0**-24
    source.offsets[4] = -3.0
    weight = stored(torch.bfloat16, source, form)
    x = torch.eye(64).bfloat16()
    found = cpu_backend(torch.bfloat16).linear(x, linear_of(weight)).float().T
    expected = source.dense(torch.float32)
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e5])
@pytest.mark.parametrize("form", [INT8, INT4], ids=str)
@pytest.mark.usefixtures("native")
def test_weights_out_of_range_are_refused(form: Integers, value: float) -> None:
    weight: Any = form.allocate(cpu_backend(torch.bfloat16), (64, 320))
    values = rand(64, 320)
    values[3, 7] = value
    with pytest.raises(ValueError, match="not finite, or too large"):
        weight.copy_(values)


@pytest.mark.parametrize("other", [Integers(4, 32), Integers(8, 64, True)], ids=str)
@pytest.mark.usefixtures("native")
def test_integers_that_the_storage_cannot_hold_are_quantized_again(other: Integers) -> None:
    weight: Any = INT8.allocate(cpu_backend(torch.bfloat16), (64, 320))
    source = integers(other, 64, 320)
    weight.copy_(source)
    expected: Any = INT8.allocate(cpu_backend(torch.bfloat16), (64, 320))
    expected.copy_(source.dense(torch.float32))
    assert torch.equal(weight.data, expected.data)
    assert torch.equal(weight.scales, expected.scales)
