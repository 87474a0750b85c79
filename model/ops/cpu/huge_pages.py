"""Memory in large pages: for weights, the KV cache and recordings."""

import contextlib
import math
import mmap

import torch


def memory(size: int) -> mmap.mmap:
    """Allocate `size` bytes of zeros, in huge pages if the system has them.

    Huge pages cause fewer page faults and fewer TLB misses. Raises MemoryError.
    """
    try:
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return mmap.mmap(-1, max(1, size))
        # Private: mmap's default is shared memory, whose huge pages have a separate setting that
        # is usually off.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        allocated = mmap.mmap(-1, max(1, size), flags=flags)
    except OSError as error:
        raise MemoryError(f"cannot allocate {size:,} bytes of memory: {error}") from error
    with contextlib.suppress(OSError):
        allocated.madvise(mmap.MADV_HUGEPAGE)
    return allocated


def tensor(memory: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor over the first bytes of the memory; it and its views keep the memory."""
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in memory of its own. Raises MemoryError."""
    return tensor(memory(math.prod(shape) * dtype.itemsize), shape, dtype)
