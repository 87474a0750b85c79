"""Integers with a scale per group: their values, and parts of them."""

import pytest
import torch

from model.ops.quantized import GroupedInt


def grouped(bits: int, offsets: bool = True) -> GroupedInt:
    """Two experts of 3 outputs and 8 inputs in groups of 4, with random codes."""
    torch.manual_seed(bits)
    first, last = (0, 16) if bits == 4 else (-128, 128)
    codes = torch.randint(first, last, (2, 3, 8), dtype=torch.int8)
    scales = torch.rand(2, 3, 2)
    return GroupedInt(bits, codes, scales, torch.randn(2, 3, 2) if offsets else None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offsets", [True, False])
def test_a_value_is_scale_times_code_plus_the_offset_of_its_group(bits: int, offsets: bool) -> None:
    weight = grouped(bits, offsets)
    values = weight.dense(torch.float32)
    assert weight.group == 4
    assert values.shape == weight.shape == (2, 3, 8)
    for expert in range(2):
        for output in range(3):
            for i in range(8):
                place = expert, output, i // 4
                value = weight.scales[place] * float(weight.codes[expert, output, i])
                if weight.offsets is not None:
                    value = value + weight.offsets[place]
                assert values[expert, output, i] == value


def test_values_are_rounded_once_to_the_wanted_dtype() -> None:
    weight = grouped(8)
    assert torch.equal(weight.dense(torch.bfloat16), weight.dense(torch.float32).bfloat16())


@pytest.mark.parametrize("index", [1, slice(1, 2), slice(0, 2)])
@pytest.mark.parametrize("offsets", [True, False])
def test_parts_of_experts_and_of_outputs_have_the_values_of_the_whole(
    index: int | slice, offsets: bool
) -> None:
    weight = grouped(4, offsets)
    values = weight.dense(torch.float32)
    assert torch.equal(weight[index].dense(torch.float32), values[index])
    assert torch.equal(weight[0][index].dense(torch.float32), values[0][index])
    assert len(weight) == 2
    assert len(weight[0]) == 3


def test_one_group_may_hold_all_inputs() -> None:
    codes = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
    weight = GroupedInt(8, codes, torch.tensor([[0.5], [2.0]]), None)
    assert weight.group == 2
    assert weight.dense(torch.float32).tolist() == [[0.5, -1.0], [6.0, 8.0]]
