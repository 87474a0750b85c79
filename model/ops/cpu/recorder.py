"""Records the native calls of a computation and replays them with one call from Python."""

import math
import mmap
import sys
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any

import torch

from model.ops.cpu import huge_pages
from model.ops.cpu.bindings import kernels, pack_call

_recorder: "Recorder | None" = None


def leave_to_torch() -> None:
    """Note that torch will compute an op. Raises RuntimeError during a recording."""
    if _recorder is not None:
        raise RuntimeError("an op of the decoder is not one of the native kernels")


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialized memory for a kernel's result."""
    if _recorder is not None:
        return _recorder.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype)


class Recorder:
    """Records the native calls of computations and returns functions that repeat them.

    Python's overhead per kernel exceeds the time of a small kernel, especially because reading the
    weights evicts the interpreter from the caches. A recorded computation must consist of native
    kernels on memory that is not moved; it raises RuntimeError if an op is left to torch.
    """

    def __init__(self) -> None:
        # Shared by all recordings, as only one of them runs at a time.
        self._buffers: list[mmap.mmap] = []
        self._by_size: list[int] = []  # indices of the buffers, the smallest first
        self._calls: list[bytes] = []

    @property
    def buffer_count(self) -> int:
        """The number of buffers for results of the recorded kernels."""
        return len(self._buffers)

    def __call__(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Compute and record; return a function that computes the same again.

        Its first call returns the result of the computation that was recorded.
        """
        global _recorder
        self._calls = []
        _recorder = kernels.recorder = self
        try:
            result = compute()
        finally:
            _recorder = kernels.recorder = None
        calls = b"".join(self._calls)
        shape, dtype = result.shape, result.dtype
        addresses = [_address(buffer) for buffer in self._buffers]
        if result.data_ptr() not in addresses:
            raise RuntimeError("the result is not of the native kernels")
        # Keep the index and not the buffer: `empty` counts references to find unused buffers.
        index = addresses.index(result.data_ptr())
        first: torch.Tensor | None = result

        def replay() -> torch.Tensor:
            nonlocal first
            if first is not None:
                out, first = first, None
                return out
            kernels.replay(calls)
            return huge_pages.tensor(self._buffers[index], shape, dtype)

        return replay

    def record_call(self, index: int, types: str, arguments: tuple[Any, ...]) -> None:
        """Record a call of the function `index` of the kernels' table."""
        self._calls.append(pack_call(index, types, arguments))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory that this recording uses for nothing else while the tensor or a view exists."""
        size = math.prod(shape) * dtype.itemsize
        for i in self._by_size[bisect_left(self._by_size, size, key=self._size) :]:
            # References from the list and the argument, none from a tensor.
            if sys.getrefcount(self._buffers[i]) == 2:
                break
        else:
            i = len(self._buffers)
            self._buffers.append(huge_pages.memory(size))
            insort(self._by_size, i, key=self._size)
        return huge_pages.tensor(self._buffers[i], shape, dtype)

    def _size(self, index: int) -> int:
        return len(self._buffers[index])


def _address(buffer: mmap.mmap) -> int:
    return torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
