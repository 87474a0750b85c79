"""Weights of 4 and 8 bits in the layout of the kernels.

In words, 32 neighbouring inputs are stored as a matrix instruction needs them: each of four lanes
holds runs of neighbours at equal distances (`Target.mxfp4_run`), which are packed in one word of
4-bit codes or in two words of 8-bit ones. So a lane loads the values that it needs and no others.
Rows of e4m3 for products of e4m3 are plain bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from model.ops.quantized import (
    GroupedFloat,
    GroupedInt,
    float8_rows,
    integer_rows,
    row_chunks,
)
from model.ops.specs import Float8Format, IntegerFormat
from model.ops.triton.tiles import Target

UNIT = 32
"""Inputs that are packed together; groups with a scale are multiples of it."""

_STORED_SCALE = 1 << 12  # float16 scales are stored times this, which makes small ones normal
_SYMMETRIC = {4: 8, 8: 128}  # the zero, by bits, of integers that have none stored


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out, in], or a stack of them, filled by rows.

    value = (code - zero) · scale: integers have unsigned codes, e4m3 has no zeros.
    """

    shape: tuple[int, ...]
    kind: str  # "int4", "int8", "fp8": in words; "fp8x8": plain e4m3, multiplied with e4m3
    codes: torch.Tensor  # words: int32 [..., out, in · bits / 32]; fp8x8: [..., out, in]
    scales: torch.Tensor  # [..., groups, out]; integers: float16, times _STORED_SCALE
    zeros: torch.Tensor | None = None  # float16, as scales
    run: int = 0  # neighbours that a lane holds; 0: plain rows
    inputs: str = ""  # fp8x8: "dynamic" or "static" scales of the rows that are multiplied
    input_scale: torch.Tensor | None = None  # float32 [1], if static; 0: none was stored

    @classmethod
    def integers(
        cls, shape: tuple[int, ...], form: IntegerFormat, device: torch.device, run: int
    ) -> QuantizedWeight:
        """Return storage for integers."""
        *outer, inputs = shape
        groups = (*outer[:-1], inputs // form.group_of(inputs), outer[-1])
        codes = torch.empty(*outer, inputs * form.bits // 32, dtype=torch.int32, device=device)
        scales = torch.empty(groups, dtype=torch.float16, device=device)
        zeros = torch.empty_like(scales) if form.has_zeros else None
        return cls(shape, f"int{form.bits}", codes, scales, zeros, run)

    @classmethod
    def float8(
        cls, shape: tuple[int, ...], form: Float8Format, device: torch.device, target: Target
    ) -> QuantizedWeight:
        """Return storage for e4m3: plain where inputs become e4m3 and the hardware has the form."""
        *outer, inputs = shape
        groups = (*outer[:-1], inputs // (form.group or inputs), outer[-1])
        scales = torch.empty(groups, dtype=torch.float32, device=device)
        if not form.inputs or target.fp8 is None or (form.group and form.group != 128):
            codes = torch.empty(*outer, inputs // 4, dtype=torch.int32, device=device)
            return cls(shape, "fp8", codes, scales, run=target.mxfp4_run)
        codes = torch.empty(shape, dtype=target.fp8, device=device)
        static = form.inputs == "static" and not form.group
        input_scale = torch.zeros(1, device=device) if static else None
        return cls(shape, "fp8x8", codes, scales, None, 0, form.inputs, input_scale)

    @property
    def bits(self) -> int:
        """The bits of a code."""
        return 4 if self.kind == "int4" else 8

    @property
    def has_zeros(self) -> bool:
        """Whether zeros are stored."""
        return self.zeros is not None

    @property
    def group(self) -> int:
        """The inputs that share a scale."""
        return self.shape[-1] // self.scales.shape[-2]

    @property
    def device(self) -> torch.device:
        """The device of the storage."""
        return self.codes.device

    def __len__(self) -> int:
        """Return the number of stacked weights, or of outputs."""
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> QuantizedWeight:
        """Return one weight of a stack, or rows of a single weight."""
        if isinstance(index, int):
            zeros = None if self.zeros is None else self.zeros[index]
            return replace(
                self,
                shape=self.shape[1:],
                codes=self.codes[index],
                scales=self.scales[index],
                zeros=zeros,
            )
        rows = range(*index.indices(self.shape[0]))
        return replace(
            self,
            shape=(len(rows), self.shape[1]),
            codes=self.codes[index],
            scales=self.scales[:, index],
            zeros=None if self.zeros is None else self.zeros[:, index],
        )

    def copy_(self, source: Any) -> None:
        """Fill a weight, or rows of it, from GroupedInt or GroupedFloat; e4m3 also from a tensor.

        Raises ValueError for values that the layout cannot represent.
        """
        for rows in row_chunks(source):
            part = source[rows]
            part = part.to(self.device) if isinstance(part, torch.Tensor) else part
            if self.kind.startswith("int"):
                own = integer_rows(part, self.bits, self.group, has_zeros=self.has_zeros)
                self[rows]._copy_integers(own)
            else:
                self[rows]._copy_float8(float8_rows(part, self.group))

    def _copy_integers(self, source: GroupedInt) -> None:
        scales = (source.scales * _STORED_SCALE).half()
        if bool(scales.isfinite().logical_not().any()):  # see `float8_rows`
            raise ValueError(f"a scale is not finite, or not below {65520 // _STORED_SCALE + 1}")
        assert source.offsets is not None
        codes = source.codes.to(self.device).view(torch.uint8)
        zeros = torch.where(source.scales == 0, 0.0, -source.offsets / source.scales)
        if self.bits == 8:
            codes, zeros = codes ^ 128, zeros + 128
        self.codes.copy_(_words(codes, self.bits, self.run))
        self.scales.copy_(scales.T)
        if self.zeros is not None:
            self.zeros.copy_(zeros.T)

    def _copy_float8(self, source: GroupedFloat) -> None:
        codes, scales = source.codes.to(self.device).view(torch.uint8), source.scales
        if self.run:
            self.codes.copy_(_words(codes, 8, self.run))
        else:
            if self.codes.dtype == torch.float8_e4m3fnuz:  # half as large; its NaN is -0
                codes, scales = codes.masked_fill(codes == 0x80, 0), 2 * scales
            self.codes.view(torch.uint8).copy_(codes)
        self.scales.copy_(scales.T)
        if self.input_scale is not None and source.input_scale is not None:
            own = source.input_scale.to(self.device)
            torch.maximum(self.input_scale, own, out=self.input_scale)

    def finished(self) -> QuantizedWeight:
        """Return the filled weight; without a static scale of inputs, they get their own."""
        if self.input_scale is None or float(self.input_scale) > 0:
            return self
        return replace(self, input_scale=None)

    def random_(self, generator: torch.Generator) -> None:
        """Fill with random values of up to about 0.03."""
        size = 0.03 / {"int4": 16, "int8": 256}.get(self.kind, 448.0)
        if self.kind.startswith("int"):
            size *= _STORED_SCALE
        self.scales.uniform_(0.4, 1.0, generator=generator).mul_(size)
        if self.zeros is not None:
            self.zeros.fill_(_SYMMETRIC[self.bits])
        codes = self.codes.view(torch.uint8).random_(0, 256, generator=generator)
        if not self.kind.startswith("int"):
            codes.masked_fill_((codes & 0x7F == 0x7F) | (codes == 0x80), 0)  # NaN of either form

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values [..., out, in], computed in float32, as one dense tensor."""
        values = torch.empty(self.shape, dtype=dtype, device=self.device)
        if len(self.shape) == 3:
            for expert, own in enumerate(values):
                own.copy_(self[expert].dense(dtype))
            return values
        for rows in row_chunks(self):
            values[rows].copy_(self[rows]._values())
        return values

    def _values(self) -> torch.Tensor:
        scales, groups = self.scales.T.float(), (-1, self.group)
        if not self.run:
            codes = self.codes.float().unflatten(-1, groups)
            return (codes * scales.unsqueeze(-1)).flatten(-2)
        codes = _codes(self.codes, self.bits, self.run)
        if self.kind == "fp8":
            values = codes.view(torch.float8_e4m3fn).float().unflatten(-1, groups)
            return (values * scales.unsqueeze(-1)).flatten(-2)
        zeros = _SYMMETRIC[self.bits] if self.zeros is None else self.zeros.T.float().unsqueeze(-1)
        values = codes.float().unflatten(-1, groups) - zeros
        return (values * (scales / _STORED_SCALE).unsqueeze(-1)).flatten(-2)


def _words(codes: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """Codes uint8 [rows, in] → words int32 [rows, in · bits / 32].

    Of 32 values each of four lanes has those of its runs. Of each two neighbours one is in the
    lower and one in the upper half of a word, so that both can be cut out at once. Pair i of a word
    is at bits `bits` · i of both halves.
    """
    runs = codes.unflatten(-1, (-1, UNIT // (4 * run), 4, run)).transpose(-3, -2)
    pairs = runs.flatten(-2).unflatten(-1, (-1, 16 // bits, 2)).int()
    shifts = torch.arange(16 // bits, dtype=torch.int32, device=codes.device) * bits
    halves = (pairs << shifts.unsqueeze(-1)).sum(-2, dtype=torch.int32)
    words = halves[..., 0] | halves[..., 1] << 16
    return words.flatten(-3)


def _codes(words: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """The inverse of `_words`."""
    shifts = torch.arange(16 // bits, device=words.device)[:, None] * bits
    shifts = shifts + torch.tensor([0, 16], device=words.device)
    pairs = words[..., None, None] >> shifts & (1 << bits) - 1
    lanes = pairs.flatten(-3).unflatten(-1, (-1, 4, UNIT // (4 * run), run))
    return lanes.transpose(-3, -2).flatten(-4).to(torch.uint8)
