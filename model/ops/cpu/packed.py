"""Weights in the layout of the kernels."""

import ctypes
from collections.abc import Sequence

import torch

from model.ops.cpu.bindings import call, fixed_point
from model.ops.cpu.huge_pages import empty
from model.ops.mxfp4 import MXFP4_BLOCK, Mxfp4

PANEL = 32  # outputs; as in kernels.cpp
SHARED = 64  # inputs that share a scale in fixed point; as in fixed.h
_LARGEST_SCALE = 250  # with it 6, the largest value of FP4, is within bf16's range


class _Weight(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64), ("inputs", ctypes.c_int64), ("mxfp4", ctypes.c_int64),
    ]  # fmt: skip


class Packed:
    """Weights [outputs, inputs], or a stack of them, in the layout of the kernels.

    Filled by rows: `weight[first:last].copy_(source)`, `weight[expert][first:last].copy_(source)`,
    from any float tensor or, if it is MXFP4, from MXFP4. A scale out of range raises ValueError.
    """

    def __init__(self, data: torch.Tensor, scales: torch.Tensor | None, shape: tuple[int, ...]):
        self.shape = shape
        self.inputs = shape[-1]
        self._data, self._scales = data, scales
        self._mxfp4 = data.dtype == torch.uint8
        self._bias: torch.Tensor | None = None
        self._structs: ctypes.Array[_Weight] | None = None

    @classmethod
    def empty(cls, shape: Sequence[int], mxfp4: bool) -> "Packed":
        """Storage for weights of a shape whose last two are outputs and inputs."""
        *stack, outputs, inputs = shape
        panels = (*stack, -(-outputs // PANEL))
        if not mxfp4:
            fixed = fixed_point()
            data = empty((*panels, inputs // 2, PANEL, 2), torch.int16 if fixed else torch.bfloat16)
            groups = -(-inputs // SHARED) if fixed else 0
        else:
            groups = inputs // MXFP4_BLOCK
            data = empty((*panels, groups, 512), torch.uint8)
        scales = empty((*panels, groups, PANEL), torch.uint8) if groups else None
        if outputs % PANEL:  # outputs that nobody will write
            data.select(len(stack), -1).zero_()
            if scales is not None:
                scales.select(len(stack), -1).fill_(127)
        return cls(data, scales, tuple(shape))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._data.device

    def __len__(self) -> int:
        """Return the number of stacked weights, or of outputs."""
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> "Packed | _Rows":
        """Return one weight of a stack, or some rows of a single one, to be filled."""
        if isinstance(index, slice):
            return _Rows(self, *index.indices(self.shape[0]))
        scales = None if self._scales is None else self._scales[index]
        return Packed(self._data[index], scales, self.shape[1:])

    def copy_(self, source: torch.Tensor | Mxfp4) -> None:
        """Fill all of a single weight."""
        _Rows(self, 0, self.shape[0], 1).copy_(source)

    def random_(self, generator: torch.Generator) -> None:
        """Fill with random values of a usual size."""
        if self._scales is None:
            self._data.uniform_(-0.03, 0.03, generator=generator)
        elif self._mxfp4:
            self._data.random_(0, 256, generator=generator)
            self._scales.fill_(120)  # values of up to 6 · 2⁻⁷
        else:
            self._data.random_(-4080, 4081, generator=generator)
            self._scales.fill_(110)  # values of up to 4080 · 2⁻¹⁷

    def described(self, bias: torch.Tensor | None) -> int:
        """Address of what tells kernels of the weights and a bias [outputs] or [stack, outputs]."""
        if self._structs is None or bias is not self._bias:
            count = self.shape[0] if len(self.shape) == 3 else 1
            made = (_Weight * count)()
            for i, struct in enumerate(made):
                struct.data = _at(self._data, i, count)
                struct.scales = None if self._scales is None else _at(self._scales, i, count)
                struct.bias = None if bias is None else _at(bias, i, count)
                struct.outputs, struct.inputs = self.shape[-2:]
                struct.mxfp4 = self._mxfp4
            self._structs, self._bias = made, bias
        return ctypes.addressof(self._structs)


def _at(stack: torch.Tensor, index: int, count: int) -> int:
    return stack.data_ptr() + index * (stack.numel() // count) * stack.element_size()


class _Rows:
    """Rows [first, last) of a weight that is being filled."""

    def __init__(self, weight: Packed, first: int, last: int, step: int):
        assert step == 1
        self._weight, self._first, self._count = weight, first, last - first

    def copy_(self, source: torch.Tensor | Mxfp4) -> None:
        """Take the rows from a source [rows, inputs] of any strides."""
        weight, threads = self._weight, torch.get_num_threads()
        if isinstance(source, Mxfp4):
            codes, scales = source.blocks, source.scales
            if int(scales.max()) > _LARGEST_SCALE:
                raise ValueError(f"an MXFP4 scale is above 2^{_LARGEST_SCALE - 127}")
            step = codes.stride(0) // (codes.shape[1] * codes.shape[2])
            assert weight._scales is not None
            call(
                "pack_mxfp4",
                weight._data.data_ptr(), weight._scales.data_ptr(), weight.inputs, self._first,
                self._count, codes.data_ptr(), scales.data_ptr(), step, threads,
            )  # fmt: skip
            return
        source = source.to(torch.bfloat16)
        call(
            "pack",
            weight._data.data_ptr(), None if weight._scales is None else weight._scales.data_ptr(),
            weight.inputs, self._first, self._count,
            source.data_ptr(), source.stride(0), source.stride(1), threads,
        )  # fmt: skip
