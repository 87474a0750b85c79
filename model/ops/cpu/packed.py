"""Weights in the layout of the native kernels."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch

from model.ops.cpu.bindings import kernels
from model.ops.cpu.huge_pages import empty, place_parts
from model.ops.mxfp4 import MXFP4_BLOCK, Mxfp4

PANEL = 32  # outputs that are stored together; as in kernels/types.h
_INT16_GROUP = 64  # inputs that share a scale as 16-bit integers; as in kernels/types.h
_MAX_SCALE = 250  # largest code whose product with 6, FP4's maximum, is in the range of bf16


class _Weight(ctypes.Structure):
    """Weight of kernels/types.h."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64), ("inputs", ctypes.c_int64), ("mxfp4", ctypes.c_int64),
    ]  # fmt: skip


class Packed:
    """Weights [outputs, inputs], or a stack of them, in the layout of the kernels.

    Filled by rows, with `weight[first:last].copy_(source)` or
    `weight[expert][first:last].copy_(source)`, from any float tensor, or from MXFP4 if the weight
    is MXFP4.
    """

    def __init__(self, data: torch.Tensor, scales: torch.Tensor | None, shape: tuple[int, ...]):
        """data and scales: see Weight in kernels/types.h; shape: that of the plain weights."""
        self.shape = shape
        self.inputs = shape[-1]
        self.data, self.scales = data, scales
        self.is_mxfp4 = data.dtype == torch.uint8
        self._bias: torch.Tensor | None = None
        self._structs: ctypes.Array[_Weight] | None = None

    @classmethod
    def empty(cls, shape: Sequence[int], mxfp4: bool, parts: int = 1) -> "Packed":
        """Return storage for weights of a shape whose last two sizes are outputs and inputs.

        parts: as in Backend.empty_weight.
        """
        *stack, outputs, inputs = shape
        panels = (*stack, -(-outputs // PANEL))
        if mxfp4:
            groups = inputs // MXFP4_BLOCK
            data = empty((*panels, groups, 512), torch.uint8)
        elif kernels.int16_weights:
            groups = -(-inputs // _INT16_GROUP)
            data = empty((*panels, inputs // 2, PANEL, 2), torch.int16)
        else:
            groups = 0
            data = empty((*panels, inputs // 2, PANEL, 2), torch.bfloat16)
        scales = empty((*panels, groups, PANEL), torch.uint8) if groups else None
        if stack:
            # The kernel divides pairs of gate and up by expert, and `down` by output.
            parts = 1 if parts > 1 else math.prod(stack)
        for tensor in (data, scales):
            if tensor is not None:
                place_parts(tensor, parts)
        if outputs % PANEL:  # the last panel has outputs that are never filled
            data.select(len(stack), -1).zero_()
            if scales is not None:
                scales.select(len(stack), -1).fill_(127)
        return cls(data, scales, tuple(shape))

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
        return Packed(self.data[index], scales, self.shape[1:])

    def copy_(self, source: torch.Tensor | Mxfp4) -> None:
        """Fill all of a single weight. Raises ValueError for a scale that is out of range."""
        _Rows(self, 0, self.shape[0], 1).copy_(source)

    def random_(self, generator: torch.Generator) -> None:
        """Fill with random values of a typical magnitude."""
        if self.scales is None:
            self.data.uniform_(-0.03, 0.03, generator=generator)
        elif self.is_mxfp4:
            self.data.random_(0, 256, generator=generator)
            self.scales.fill_(120)  # values of up to 6 · 2⁻⁷
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
                struct.bias = None if bias is None else _address(bias, i, count)
                struct.outputs, struct.inputs = self.shape[-2:]
                struct.mxfp4 = self.is_mxfp4
            self._structs, self._bias = structs, bias
        return ctypes.addressof(self._structs)


def _address(stack: torch.Tensor, index: int, count: int) -> int:
    return stack.data_ptr() + index * (stack.numel() // count) * stack.element_size()


class _Rows:
    """Rows [first, last) of a weight that is being filled."""

    def __init__(self, weight: Packed, first: int, last: int, step: int):
        assert step == 1
        self._weight, self._first, self._count = weight, first, last - first

    def copy_(self, source: Any) -> None:
        """Copy the rows of a source [rows, inputs]: Mxfp4 for an MXFP4 weight, else a tensor."""
        if self._weight.is_mxfp4:
            self._copy_mxfp4(source)
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
