"""Weights in the layout of the native kernels."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch

from model.ops.cpu.bindings import kernels
from model.ops.cpu.huge_pages import empty, place_parts
from model.ops.mxfp4 import MXFP4_BLOCK, Mxfp4
from model.ops.quantized import GroupedInt, with_8_bits
from model.ops.specs import IntegerFormat

PANEL = 32  # outputs that are stored together; as in kernels/types.h
DENSE, MXFP4, _INT8, _INT4 = range(4)  # kinds of weights; as in kernels/types.h
ROTATED = "rotated 8"
_ROWS = {"8": 0, ROTATED: 1, "16": 2}  # forms of rows; as in kernels/types.h
_INT16_GROUP = 64  # inputs that share a scale as 16-bit integers; as in kernels/types.h
_STORED_SCALE = 1 << 12  # float16 scales of integers are stored times this; as in gemm/int8/int8.h
_CHUNK_VALUES = 1 << 22  # that are quantized at once
_COMPRESSED_UNIT = 192  # bytes of 4 inputs of a compressed panel; as in gemm/compressed.h
_MOST_EXCEPTIONS = 1 / 512  # of the values of a compressed weight
_MAX_SCALE = 250  # largest code whose product with 6, FP4's maximum, is in the range of bf16


class _Weight(ctypes.Structure):
    """Weight of kernels/types.h."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p), ("outputs", ctypes.c_int64), ("inputs", ctypes.c_int64),
        ("kind", ctypes.c_int64), ("group", ctypes.c_int64), ("rows", ctypes.c_int64),
        ("compressed", ctypes.c_void_p), ("bases", ctypes.c_void_p),
        ("exceptions", ctypes.c_void_p), ("ends", ctypes.c_void_p),
    ]  # fmt: skip


class Packed:
    """Weights [outputs, inputs], or a stack of them, in the layout of the kernels.

    Filled by rows, with `weight[first:last].copy_(source)` or
    `weight[expert][first:last].copy_(source)`: from MXFP4 if the weight is MXFP4, from integers or
    any float tensor, which is then quantized, if it has integers, else from any float tensor.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        kind: int,
        data: torch.Tensor,
        scales: torch.Tensor | None,
        zeros: torch.Tensor | None = None,
        rows: str = "8",
    ):
        """shape: that of the plain weights; rows: as in IntegerFormat; the others: see Weight in
        kernels/types.h.
        """
        self.shape, self.kind, self.rows = shape, kind, rows
        self.inputs = shape[-1]
        self.data, self.scales, self.zeros = data, scales, zeros
        self._compressed: tuple[torch.Tensor, ...] | None = None  # CompressedWeight in types.h
        self._parts = 1
        self._bias: torch.Tensor | None = None
        self._structs: ctypes.Array[_Weight] | None = None

    @classmethod
    def empty(cls, shape: Sequence[int], kind: int = DENSE, parts: int = 1) -> "Packed":
        """Return storage for weights of a shape whose last two sizes are outputs and inputs.

        kind: DENSE or MXFP4; parts: as in Backend.empty_weight.
        """
        *stack, outputs, inputs = shape
        panels = (*stack, -(-outputs // PANEL))
        if kind == MXFP4:
            groups = inputs // MXFP4_BLOCK
            data = empty((*panels, groups, 512), torch.uint8)
        elif kernels.int16_weights:
            groups = -(-inputs // _INT16_GROUP)
            data = empty((*panels, inputs // 2, PANEL, 2), torch.int16)
        else:
            groups = 0
            data = empty((*panels, inputs // 2, PANEL, 2), torch.bfloat16)
        scales = empty((*panels, groups, PANEL), torch.uint8) if groups else None
        _place(parts, stack, data, scales)
        if outputs % PANEL:  # the last panel has outputs that are never filled
            data.select(len(stack), -1).zero_()
            if scales is not None:
                scales.select(len(stack), -1).fill_(127)
        weight = cls(tuple(shape), kind, data, scales)
        weight._parts = parts
        return weight

    @classmethod
    def empty_integers(cls, shape: Sequence[int], form: IntegerFormat, parts: int = 1) -> "Packed":
        """As `empty`, for integers; the group must divide the inputs."""
        *stack, outputs, inputs = shape
        panels = (*stack, -(-outputs // PANEL))
        data = empty((*panels, inputs // 4, PANEL * form.bits // 8, 4), torch.uint8)
        groups = inputs // form.group_of(inputs)
        scales = empty((*panels, groups, PANEL), torch.float16)
        zeros = empty((*panels, groups, PANEL), torch.float16) if form.has_zeros else None
        _place(parts, stack, data, scales, zeros)
        if outputs % PANEL:  # see `empty`
            for tensor in (data, scales, *([] if zeros is None else [zeros])):
                tensor.select(len(stack), -1).zero_()
        kind = _INT8 if form.bits == 8 else _INT4
        return cls(tuple(shape), kind, data, scales, zeros, form.rows)

    @property
    def bits(self) -> int:
        """The bits of integers."""
        return 8 if self.kind == _INT8 else 4

    @property
    def group(self) -> int:
        """The inputs that share a scale of integers; 0 for other kinds."""
        if self.kind < _INT8:
            return 0
        assert self.scales is not None
        return self.inputs // self.scales.shape[-2]

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.data.device

    def __len__(self) -> int:
        """Return the number of stacked weights, or of outputs."""
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> "Packed | _Rows":
        """Return one weight of a stack, or rows of a single weight that are to be filled."""
        if isinstance(index, slice):
            return _Rows(self, *index.indices(self.shape[0]))
        scales = None if self.scales is None else self.scales[index]
        zeros = None if self.zeros is None else self.zeros[index]
        return Packed(self.shape[1:], self.kind, self.data[index], scales, zeros, self.rows)

    def copy_(self, source: torch.Tensor | Mxfp4 | GroupedInt) -> None:
        """Fill all of a single weight. Raises ValueError for a scale that is out of range."""
        _Rows(self, 0, self.shape[0], 1).copy_(source)

    @property
    def compressed_bytes(self) -> int:
        """The bytes of a compressed copy; 0 where the kernels use none."""
        if self.kind != DENSE or not kernels.compresses:
            return 0
        return self.data.numel() // (4 * PANEL) * _COMPRESSED_UNIT

    def compress(self) -> bool:
        """Add a compressed copy to a filled weight; False if its exponents differ too much.

        Raises MemoryError and RuntimeError for lack of memory.
        """
        *panels, pairs, _, _ = self.data.shape
        count, threads = math.prod(panels), torch.get_num_threads()
        bases = torch.empty(count, dtype=torch.uint8)
        ends = torch.zeros(count + 1, dtype=torch.int32)
        kernels.choose_exponents(
            self.data.data_ptr(), self.inputs, count, bases.data_ptr(), ends[1:].data_ptr(), threads
        )
        total = int(ends.sum(dtype=torch.int64))
        if total > min(self.data.numel() * _MOST_EXCEPTIONS, 2**31 - 1):
            return False
        ends = ends.cumsum(0, dtype=torch.int32)
        exceptions = torch.empty((total, 2), dtype=torch.int32)
        data = empty((*panels, pairs // 2, _COMPRESSED_UNIT), torch.uint8)
        _place(self._parts, self.shape[:-2], data)
        kernels.compress(
            self.data.data_ptr(), self.inputs, count, bases.data_ptr(), ends.data_ptr(),
            data.data_ptr(), exceptions.data_ptr(), threads,
        )  # fmt: skip
        self._compressed = data, bases, exceptions, ends
        self._refer_to_copy()
        return True

    def _refer_to_copy(self) -> None:
        """Write the addresses of the copy to the structures, which steps may have recorded."""
        if self._structs is None or self._compressed is None:
            return
        data, bases, exceptions, ends = self._compressed
        count = len(self._structs)
        for i, struct in enumerate(self._structs):
            struct.compressed = _address(data, i, count)
            struct.bases = _address(bases, i, count)
            struct.exceptions = exceptions.data_ptr()
            struct.ends = ends[i * (len(bases) // count) :].data_ptr()

    def random_(self, generator: torch.Generator) -> None:
        """Fill with random values of a typical magnitude."""
        if self.scales is None:
            self.data.uniform_(-0.03, 0.03, generator=generator)
        elif self.kind == MXFP4:
            self.data.random_(0, 256, generator=generator)
            self.scales.fill_(120)  # values of up to 6 · 2⁻⁷
        elif self.kind >= _INT8:
            self.data.random_(0, 256, generator=generator)
            self.scales.fill_(0.03 * _STORED_SCALE / 2 ** (self.bits - 1))  # values of up to 0.03
            if self.zeros is not None:
                self.zeros.zero_()
        else:
            self.data.random_(-4080, 4081, generator=generator)
            self.scales.fill_(110)  # values of up to 4080 · 2⁻¹⁷

    def described(self, bias: torch.Tensor | None) -> int:
        """Address of `Weight` structures, one per weight; bias [outputs] or [stack, outputs].

        The address is valid until the next call with another bias.
        """
        if self._structs is None or bias is not self._bias:
            count = self.shape[0] if len(self.shape) == 3 else 1
            structs = (_Weight * count)()
            for i, struct in enumerate(structs):
                struct.data = _address(self.data, i, count)
                struct.scales = None if self.scales is None else _address(self.scales, i, count)
                struct.zeros = None if self.zeros is None else _address(self.zeros, i, count)
                struct.bias = None if bias is None else _address(bias, i, count)
                struct.outputs, struct.inputs = self.shape[-2:]
                struct.kind, struct.group, struct.rows = self.kind, self.group, _ROWS[self.rows]
            self._structs, self._bias = structs, bias
            self._refer_to_copy()
        return ctypes.addressof(self._structs)


def _place(parts: int, stack: Sequence[int], *tensors: torch.Tensor | None) -> None:
    """Place storage on the NUMA nodes that use it; parts: as in Backend.empty_weight."""
    if stack:
        # The kernel divides pairs of gate and up by expert, and `down` by output.
        parts = 1 if parts > 1 else math.prod(stack)
    for tensor in tensors:
        if tensor is not None:
            place_parts(tensor, parts)


def _address(stack: torch.Tensor, index: int, count: int) -> int:
    return stack.data_ptr() + index * (stack.numel() // count) * stack.element_size()


class _Rows:
    """Rows [first, last) of a weight that is being filled."""

    def __init__(self, weight: Packed, first: int, last: int, step: int):
        assert step == 1
        self._weight, self._first, self._count = weight, first, last - first

    def copy_(self, source: Any) -> None:
        """Copy the rows of a source [rows, inputs]; see Packed."""
        if self._weight.kind == MXFP4:
            self._copy_mxfp4(source)
        elif self._weight.kind in (_INT8, _INT4):
            self._copy_integers(source)
        else:
            self._copy_dense(source)

    def _copy_mxfp4(self, source: Mxfp4) -> None:
        weight, codes = self._weight, source.blocks
        if int(source.scales.max()) > _MAX_SCALE:
            raise ValueError(f"an MXFP4 scale is above 2^{_MAX_SCALE - 127}")
        assert weight.scales is not None
        row_step = codes.stride(0) // (codes.shape[1] * codes.shape[2])
        kernels.pack_mxfp4(
            weight.data.data_ptr(), weight.scales.data_ptr(), weight.inputs, self._first,
            self._count, codes.data_ptr(), source.scales.data_ptr(), row_step,
            torch.get_num_threads(),
        )  # fmt: skip

    def _copy_dense(self, source: torch.Tensor) -> None:
        """Copy a tensor of any dtype and strides."""
        weight, source = self._weight, source.to(torch.bfloat16)
        kernels.pack(
            weight.data.data_ptr(), None if weight.scales is None else weight.scales.data_ptr(),
            weight.inputs, self._first, self._count,
            source.data_ptr(), source.stride(0), source.stride(1), torch.get_num_threads(),
        )  # fmt: skip

    def _copy_integers(self, source: Any) -> None:
        """Copy integers that fit, or quantize any other source, some rows at a time."""
        weight = self._weight
        step = max(1, _CHUNK_VALUES // weight.inputs)
        for first in range(0, self._count, step):
            rows = source[first : min(first + step, self._count)]
            if weight.bits == 8 and weight.zeros is not None:
                rows = with_8_bits(rows)
            if not self._fits(rows):
                values = rows if isinstance(rows, torch.Tensor) else rows.dense(torch.float32)
                rows = quantize(values, self._weight.bits, weight.group, weight.rows)
            self._pack_integers(first, rows)

    def _fits(self, source: Any) -> bool:
        """Whether these are integers that the storage can hold as they are."""
        weight = self._weight
        if not isinstance(source, GroupedInt) or weight.rows == ROTATED:
            return False
        is_symmetric = source.offsets is None or not bool(_stored_zeros(source).any())
        return (
            source.bits == weight.bits
            and source.group % weight.group == 0
            and (weight.zeros is not None or is_symmetric)
        )

    def _pack_integers(self, first: int, source: GroupedInt) -> None:
        """Pack integers as the rows from `first` on."""
        weight, source = self._weight, _with_scales(source)
        assert weight.scales is not None
        stored = _stored_scales(source)
        zeros = None if weight.zeros is None else _stored_zeros(source)
        repeats = source.group // weight.group
        if repeats > 1:
            stored = stored.repeat_interleave(repeats, dim=1)
            zeros = None if zeros is None else zeros.repeat_interleave(repeats, dim=1)
        codes = source.codes.contiguous()
        kernels.pack_int8(
            weight.data.data_ptr(), weight.scales.data_ptr(),
            None if weight.zeros is None else weight.zeros.data_ptr(), weight.kind, weight.inputs,
            stored.shape[1], self._first + first, len(codes), codes.data_ptr(), stored.data_ptr(),
            None if zeros is None else zeros.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip


def quantize(values: torch.Tensor, bits: int, group: int, rows: str = "8") -> GroupedInt:
    """values [out, in] of any dtype → integers with a scale, of 4 bits an offset, for each group.

    Scales and the kernels' zeros are exact as float16; of several scales the one with the least
    squared error is taken. rows: those of the format; with rotated ones the integers are those of
    the rotated values.
    """
    values = values.float().contiguous()
    outputs, inputs = values.shape
    if rows == ROTATED:
        values = rotate(values, group)
    codes = torch.empty(outputs, inputs, dtype=torch.int8)
    scales = torch.empty(outputs, inputs // group)
    offsets = None if bits == 8 else torch.empty_like(scales)
    kernels.quantize_weight(
        values.data_ptr(), bits, group, outputs, inputs, codes.data_ptr(), scales.data_ptr(),
        None if offsets is None else offsets.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return GroupedInt(bits, codes, scales, offsets)


def rotate(values: torch.Tensor, group: int) -> torch.Tensor:
    """values float32 [rows, in] → those rounded to "rotated 8" bits: see gemm/int8/rotation.h.

    group: inputs that share a scale of the weights.
    """
    rotated = values.clone()
    kernels.rotate(rotated.data_ptr(), group, values.numel() // group, torch.get_num_threads())
    return rotated


def _with_scales(source: GroupedInt) -> GroupedInt:
    """The same weights, where values that are nearly their offset are 0 · scale + offset.

    Their offsets would be too large, or infinite, as multiples of their scales.
    """
    if source.offsets is None:
        return source
    constant = source.offsets.abs() > source.scales.abs() * 2**17
    if not constant.any():
        return source
    codes = source.codes.masked_fill(constant.repeat_interleave(source.group, dim=1), 0)
    scales = torch.where(constant, source.offsets, source.scales)
    return GroupedInt(source.bits, codes, scales, source.offsets)


def _stored_scales(source: GroupedInt) -> torch.Tensor:
    """The scales as the kernels read them, float16 [rows, groups]. Raises ValueError."""
    stored = (source.scales * _STORED_SCALE).half()
    if not stored.isfinite().all():
        raise ValueError(
            "a weight is not finite, or too large for integers with scales below "
            f"{65520 // _STORED_SCALE + 1}"
        )
    return stored.contiguous()


def _stored_zeros(source: GroupedInt) -> torch.Tensor:
    """The zeros as the kernels read them, float16 [rows, groups]: see gemm/int8/int8.h.

    They are offset / scale, plus 8 for codes from 0 to 15, divided by the codes' negative bias.
    """
    offsets, scales = source.offsets, source.scales
    zeros = torch.zeros_like(scales) if offsets is None else offsets / scales
    zeros = torch.where(scales == 0, 0 if source.bits == 8 else -8, zeros)
    return ((zeros / -128) if source.bits == 8 else (zeros + 8) / -8).half().contiguous()
