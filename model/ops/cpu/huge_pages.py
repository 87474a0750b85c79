"""Memory in large pages, on the NUMA nodes that use it: weights, KV cache and recordings."""

import contextlib
import ctypes
import math
import mmap
import platform

import torch

from model.ops.cpu.topology import topology

_HUGE_PAGE = 1 << 21
_MBIND = {"x86_64": 237, "aarch64": 235}.get(platform.machine())  # the number of the system call
_PREFERRED, _INTERLEAVE = 1, 3  # policies of mbind(2)


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


def place_parts(tensor: torch.Tensor, parts: int) -> None:
    """Place each of `parts` equal parts of a tensor on the NUMA nodes, divided in their order.

    The kernels divide the outputs of a weight among the nodes in this way. Call it before anything
    is written. Boundaries are rounded to whole huge pages.
    """
    nodes = list(topology().nodes)
    if len(nodes) == 1:
        return
    start, size, count = tensor.data_ptr(), tensor.nbytes, parts * len(nodes)
    bounds = [start + size * i // count for i in range(count + 1)]
    inner = [round(address / _HUGE_PAGE) * _HUGE_PAGE for address in bounds[1:-1]]
    bounds = [start, *(min(max(start, address), bounds[-1]) for address in inner), bounds[-1]]
    for i in range(count):
        if bounds[i] < bounds[i + 1]:
            _bind(bounds[i], bounds[i + 1], _PREFERRED, [nodes[i % len(nodes)]])


def interleave(tensor: torch.Tensor) -> None:
    """Distribute the pages of a tensor evenly among the nodes. Call it before it is written."""
    if len(topology().nodes) > 1:
        first = tensor.data_ptr()
        _bind(first, first + tensor.nbytes, _INTERLEAVE, list(topology().nodes))


def _bind(first: int, end: int, policy: int, nodes: list[int]) -> int:
    """Set the policy of the pages from `first` to `end`; returns 0 if the system permits it.

    Without it, memory is on the node of the thread that writes it first: slower, but not wrong.
    """
    if _MBIND is None:
        return -1
    mask = (ctypes.c_ulong * 16)()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    bits = 8 * ctypes.sizeof(mask)
    address, size = ctypes.c_void_p(first), ctypes.c_ulong(end - first)
    return ctypes.CDLL(None).syscall(_MBIND, address, size, policy, mask, bits, 0)
