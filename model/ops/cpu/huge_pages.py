"""Large memory by the page: what weights, the KV cache and recordings lie in."""

import contextlib
import math
import mmap

import torch


def memory(size: int) -> mmap.mmap:
    """So many bytes of zeros, in huge pages where the system has them: fewer faults and misses.

    Raises MemoryError.
    """
    try:
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return mmap.mmap(-1, max(1, size))
        # Shared memory, which is what one gets unless asked, has rules of its own for huge pages.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        found = mmap.mmap(-1, max(1, size), flags=private)
    except OSError as error:
        raise MemoryError(f"the system gave no {size:,} bytes of memory: {error}") from error
    with contextlib.suppress(OSError):
        found.madvise(mmap.MADV_HUGEPAGE)
    return found


def tensor(memory: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The first bytes of the memory; the tensor and its views keep it."""
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in memory of its own."""
    return tensor(memory(math.prod(shape) * dtype.itemsize), shape, dtype)
