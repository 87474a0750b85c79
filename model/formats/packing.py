"""Parts of packed tensors, and integers out of words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.formats.format import Part

if TYPE_CHECKING:
    import torch

    from model.ops.quantized import GroupedInt


def cut(part: Part, shape: tuple[int, ...], unit: int, items: int = 1) -> Part:
    """The part of a tensor that has `items` for each `unit` of inputs, the last dimension.

    part: of the weight [..., out, in] of this shape. Raises ValueError if a unit would be divided.
    """
    inputs = shape[-1]
    if inputs % unit:
        raise ValueError(f"{inputs} inputs are not a multiple of {unit}, which share a scale")
    if len(part) < len(shape):
        return part
    return (*part[:-1], scaled(part[-1], inputs, unit, items))


def scaled(part: slice, size: int, unit: int, items: int = 1) -> slice:
    """A slice of a dimension of `size`, in a dimension that has `items` for each `unit` of it.

    Raises ValueError if a unit would be divided.
    """
    first, last, _ = part.indices(size)
    if first % unit or (last % unit and last != size):
        raise ValueError(
            f"the rows or columns {first} to {last} divide a group of {unit} that is stored as a"
            " whole: split the model over fewer ranks"
        )
    return slice(first // unit * items, -(-last // unit) * items)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Words int32 [rows, words] → the first `count` integers in each row, uint8 [rows, count].

    bits: of an integer, 4 or 8; the low bits of a word are the first one.
    """
    import torch

    found = words.contiguous().view(torch.uint8)
    if bits == 4:
        found = torch.stack((found & 15, found >> 4), dim=-1).flatten(-2)
    return found[:, :count]


def grouped(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | int, bits: int
) -> GroupedInt:
    """The weight scale · (code - zero).

    codes: unsigned, uint8 [out, in]; scales and zeros [out, groups], or one zero for all.
    """
    import torch

    from model.ops.quantized import GroupedInt

    scales = scales.float().contiguous()
    if bits == 8:
        codes, zeros = codes ^ 128, zeros - 128
    is_zero = isinstance(zeros, int) and zeros == 0
    offsets = None if is_zero else -scales * zeros
    return GroupedInt(bits, codes.view(torch.int8), scales, offsets)


def in_order(index: torch.Tensor, groups: int) -> bool:
    """Whether the groups of all inputs are those of equal, neighbouring parts.

    index [in]: the group of each input. Raises ValueError for one that does not exist.
    """
    import torch

    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise ValueError(f"an input's group is not one of the {groups} groups")
    inputs = len(index)
    if inputs % groups:
        return False
    return torch.equal(index.long(), torch.arange(inputs) // (inputs // groups))


def by_index(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | int, index: torch.Tensor
) -> torch.Tensor:
    """The values of `grouped` in float32, with the group of each input in index [in]."""
    index = index.long()
    values = codes.float()
    values -= zeros if isinstance(zeros, int) else zeros.float()[:, index]
    values *= scales.float()[:, index]
    return values
