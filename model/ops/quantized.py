"""Weights as small numbers with a scale per group of inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from model.ops.specs import IntegerFormat

_CHUNK_VALUES = 16 << 20  # values that are float32 at the same time
_MAX_E4M3 = 448.0


class _Grouped(ABC):
    """What both kinds have in common: codes [..., out, in], scales float32 [..., out, in / group].

    Each is one weight, or a stack of weights.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values: ..., out, in."""
        return tuple(self.codes.shape)

    @property
    def device(self) -> torch.device:
        """The device of the storage."""
        return self.codes.device

    @property
    def group(self) -> int:
        """Neighbouring inputs that share a scale."""
        return self.codes.shape[-1] // self.scales.shape[-1]

    def __len__(self) -> int:
        """Return the length of the first dimension."""
        return len(self.codes)

    @abstractmethod
    def __getitem__(self, index: int | slice) -> _Grouped:
        """Return a part of the first dimension: of the experts, or of one weight's outputs."""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values [..., out, in], computed in float32, as one dense tensor."""
        values = torch.empty(self.shape, dtype=dtype, device=self.device)
        rows = max(1, _CHUNK_VALUES * len(self) // max(1, self.codes.numel()))
        for first in range(0, len(self), rows):
            part = slice(first, first + rows)
            values[part].copy_(self[part]._values())
        return values

    def _values(self) -> torch.Tensor:
        """The values in float32."""
        codes = self.codes.unflatten(-1, (-1, self.group)).float()
        return codes.mul_(self.scales.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class GroupedInt(_Grouped):
    """Weights [..., out, in] as integers with a scale (and an offset) per output and group of
    inputs: value = scale · code + offset.
    """

    bits: int  # 4 or 8
    # int8 [..., out, in], one code a byte: from -128 to 127 with 8 bits, from 0 to 15 with 4.
    codes: torch.Tensor
    scales: torch.Tensor  # float32 [..., out, in / group]
    # float32 as scales; None: 0. Symmetric weights of 4 bits have -8 · scale.
    offsets: torch.Tensor | None
    has_zeros: bool = True  # of storage: whether the offsets may be those of any zeros

    @classmethod
    def empty(cls, shape: tuple[int, ...], form: IntegerFormat, device: torch.device) -> GroupedInt:
        """Return storage that is filled by rows; the group must divide the inputs."""
        groups = *shape[:-1], shape[-1] // form.group_of(shape[-1])
        scales, offsets = (torch.empty(groups, device=device) for _ in range(2))
        codes = torch.empty(shape, dtype=torch.int8, device=device)
        return cls(form.bits, codes, scales, offsets, form.has_zeros)

    def __getitem__(self, index: int | slice) -> GroupedInt:
        """Return a part of the first dimension: of the experts, or of one weight's outputs."""
        offsets = None if self.offsets is None else self.offsets[index]
        return GroupedInt(self.bits, self.codes[index], self.scales[index], offsets, self.has_zeros)

    def copy_(self, source: GroupedInt) -> None:
        """Fill a weight, or rows of it. Raises ValueError for integers of another kind."""
        found = integer_rows(source, self.bits, self.group, has_zeros=self.has_zeros)
        assert self.offsets is not None
        assert found.offsets is not None
        self.codes.copy_(found.codes)
        self.scales.copy_(found.scales)
        self.offsets.copy_(found.offsets)

    def random_(self, generator: torch.Generator) -> None:
        """Fill with random values of up to about 0.03."""
        assert self.offsets is not None
        first, last = (0, 16) if self.bits == 4 else (-128, 128)
        self.codes.random_(first, last, generator=generator)
        self.scales.uniform_(0.4, 1.0, generator=generator).mul_(0.03 / (last - first))
        self.scales.copy_(self.scales.half())  # as checkpoints have them
        zero = 8 if self.bits == 4 else 0
        self.offsets.fill_(zero)
        if self.has_zeros:
            self.offsets.random_(zero - 4, zero + 5, generator=generator)
        self.offsets.mul_(self.scales).neg_()

    def _values(self) -> torch.Tensor:
        values = super()._values()
        if self.offsets is not None:
            values.unflatten(-1, (-1, self.group)).add_(self.offsets.unsqueeze(-1))
        return values


@dataclass(frozen=True)
class GroupedFloat(_Grouped):
    """Weights [..., out, in] as floats with a scale per output and group of inputs:
    value = scale · code.
    """

    codes: torch.Tensor  # [..., out, in] of a dtype of 8 bits
    scales: torch.Tensor  # float32 [..., out, in / group]
    # float32 [1]: of the inputs of the linear, where a checkpoint has one; storage: 0 without one.
    input_scale: torch.Tensor | None = None

    @classmethod
    def empty(cls, shape: tuple[int, ...], group: int, device: torch.device) -> GroupedFloat:
        """Return storage in E4M3, filled by rows; group: a divisor of the inputs."""
        return cls(
            torch.empty(shape, dtype=torch.float8_e4m3fn, device=device),
            torch.empty(*shape[:-1], shape[-1] // group, device=device),
        )

    def __getitem__(self, index: int | slice) -> GroupedFloat:
        """Return a part of the first dimension: of the experts, or of one weight's outputs."""
        return GroupedFloat(self.codes[index], self.scales[index], self.input_scale)

    def copy_(self, source: Any) -> None:
        """Fill a weight, or rows of it, from numbers in E4M3, or from a tensor, which is rounded.

        Raises ValueError for values that are not finite.
        """
        for rows in row_chunks(source):
            part = float8_rows(source[rows], self.group)
            # As bytes: torch copies E4M3 between devices and layouts only in some versions.
            self.codes[rows].view(torch.uint8).copy_(part.codes.view(torch.uint8))
            self.scales[rows].copy_(part.scales)

    def random_(self, generator: torch.Generator) -> None:
        """Fill with random values of up to 0.03."""
        codes = self.codes.view(torch.uint8).random_(0, 256, generator=generator)
        codes.masked_fill_(codes & 0x7F == 0x7F, 0)  # NaN
        self.scales.uniform_(0.4, 1.0, generator=generator).mul_(0.03 / _MAX_E4M3)


def row_chunks(source: Any) -> Iterator[slice]:
    """Slices of the rows of a weight [out, in] that are small enough to be float32."""
    step = max(1, _CHUNK_VALUES // source.shape[-1])
    return (slice(i, min(i + step, len(source))) for i in range(0, len(source), step))


def float8_rows(source: Any, group: int) -> GroupedFloat:
    """Return rows in E4M3 with a scale for each `group` of inputs.

    source: GroupedFloat in E4M3 whose groups are multiples of these, or another weight [rows, in],
    which is rounded: the largest value of a group becomes 448. Raises ValueError for values that
    are not finite.
    """
    fits = isinstance(source, GroupedFloat) and source.group % group == 0
    if not (fits or isinstance(source, torch.Tensor)):
        source = source.dense(torch.float32)
    if isinstance(source, torch.Tensor):
        values = source.float().unflatten(-1, (-1, group))
        scales = values.abs().amax(-1) / _MAX_E4M3
        # With `any`, weights load on the simulated GPU of benchmarks, too, whose results are zero.
        if bool(scales.isfinite().logical_not().any()):
            raise ValueError("a weight is not finite")
        values = values / scales.masked_fill(scales == 0, 1).unsqueeze(-1)
        return GroupedFloat(values.flatten(-2).to(torch.float8_e4m3fn), scales)
    if bool((source.codes.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise ValueError("a weight is not finite")
    scales = source.scales.repeat_interleave(source.group // group, -1)
    return GroupedFloat(source.codes, scales, source.input_scale)


def integer_rows(source: Any, bits: int, group: int, *, has_zeros: bool) -> GroupedInt:
    """Return integers with a scale and an offset for each `group` of inputs.

    Integers of 4 bits are also some of 8 bits, and smaller groups are rounded to 8 bits again.
    Raises ValueError unless others have these bits, groups that are multiples of these, and zeros
    only if the storage has them.
    """
    if bits == 8 and has_zeros:
        source = with_8_bits(source)
    if bits == 8 and source.group < group:
        source = _rounded(source, group)
    if source.bits != bits or source.group % group:
        raise ValueError(
            f"{source.bits} bits with a scale for each {source.group} do not fit {bits} bits"
            f" with a scale for each {group}"
        )
    scales, offsets = source.scales, source.offsets
    symmetric = -8 * scales if bits == 4 else torch.zeros_like(scales)
    if offsets is None:
        offsets = torch.zeros_like(scales)
    if not has_zeros and bool((offsets != symmetric).any()):
        raise ValueError(
            "zero points are stored, but the config says that the weights are symmetric"
        )
    repeats = source.group // group
    return GroupedInt(
        bits,
        source.codes,
        scales.repeat_interleave(repeats, -1),
        offsets.repeat_interleave(repeats, -1),
    )


def with_8_bits(source: Any) -> Any:
    """Integers of 4 bits with offsets as integers of 8 bits; others as they are."""
    has_codes = isinstance(source, GroupedInt) and source.bits == 4 and source.offsets is not None
    return replace(source, bits=8) if has_codes else source


def _rounded(source: Any, group: int) -> GroupedInt:
    """Integers of 8 bits without offsets: values change by up to 1/254 of a group's largest."""
    values = source.dense(torch.float32).unflatten(-1, (-1, group))
    scales = values.abs().amax(-1) / 127
    codes = (values / scales.masked_fill(scales == 0, 1).unsqueeze(-1)).round_().flatten(-2)
    return GroupedInt(8, codes.to(torch.int8), scales, None)
