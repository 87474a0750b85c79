"""The library of `kernels.cpp`: found, loaded, called, and calls recorded to be made again.

It is built when getp is installed, if there is a compiler. Which of its instruction sets runs is
chosen here, by the processor or by the environment variable GETP_CPU_KERNELS.
"""

import ctypes
import functools
import math
import mmap
import os
import struct
import sys
import warnings
from bisect import bisect_left, insort
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from model.ops.cpu import huge_pages as pages
from model.ops.cpu import onednn as plain

VARIABLE = "GETP_CPU_KERNELS"
LEVELS = ("none", "avx2", "vnni", "avx512", "amx")
"""Values of the variable, numbered as in kernels.cpp: torch alone, AVX2 (other architectures: the
compiler's vectors), AVX-512 with VNNI, AVX-512 with BF16, and that with AMX. With avx2 (on x86)
and vnni linears are in fixed point."""


class KernelsError(ValueError):
    """The environment asks for kernels that there are not."""


_Pointer, _Int, _Flag, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
# The first ones are numbered as in kernels.cpp's getp_replay.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "linear": (*[_Pointer] * 2, _Int, _Pointer, _Flag),
    "gated_linear": (*[_Pointer] * 2, _Int, _Flag, *[_Float] * 2, _Pointer, _Flag),
    "gather": (_Pointer, _Int, _Pointer, _Int, _Pointer),
    "add_rms_norm": (*[_Pointer] * 3, *[_Int] * 2, _Float, *[_Pointer] * 2, _Flag),
    "rotate_and_write": (
        *[_Pointer] * 3, _Int, *[_Pointer] * 3, _Float, *[_Int] * 4, _Pointer, _Flag,
    ),
    "attention": (
        *[_Pointer] * 2, _Int, _Pointer, _Int, *[_Pointer] * 3, *[_Int] * 6, _Pointer, _Flag,
    ),
    "route": (_Pointer, *[_Int] * 3, *[_Flag] * 2, *[_Pointer] * 2, _Flag),
    "experts": (
        *[_Pointer] * 2, _Int, _Pointer, _Int, *[_Pointer] * 2, _Int, _Flag, *[_Float] * 2,
        _Pointer, _Flag,
    ),
    "pack": (*[_Pointer] * 2, *[_Int] * 3, _Pointer, *[_Int] * 2, _Flag),
    "pack_mxfp4": (*[_Pointer] * 2, *[_Int] * 3, *[_Pointer] * 2, _Int, _Flag),
}  # fmt: skip
_OPS = {name: i for i, name in enumerate(_SIGNATURES)}
_MOST_ARGUMENTS = max(map(len, _SIGNATURES.values()))


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the kernels, ready to be called; None where they cannot be, said once and why."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in LEVELS:
        raise KernelsError(f"{VARIABLE} must be {', '.join(LEVELS)}, not {wanted!r}")
    if wanted == "none":
        return None
    # Not any file there: what another Python's installation left may be of older sources.
    files = [Path(__file__).with_name(f"_kernels{suffix}") for suffix in EXTENSION_SUFFIXES]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        _say("they were not built: `pip install -e .` with a C++ compiler builds them")
        return None
    try:
        found = load(file)
    except (OSError, AttributeError) as error:
        _say(f"{file.name} does not load ({error}); install again to build it anew")
        return None
    best: int = found.getp_best_level()
    if wanted and not found.getp_has_level(LEVELS.index(wanted)):
        has = [name for i, name in enumerate(LEVELS) if not i or found.getp_has_level(i)]
        raise KernelsError(f"{VARIABLE} is {wanted}, and this processor has only {', '.join(has)}")
    if not best:
        _say("they need AVX2, which this processor lacks")
        return None
    found.getp_use_level(LEVELS.index(wanted) if wanted else best)
    return found


def load(file: Path) -> ctypes.CDLL:
    """Load a library of the kernels. Raises OSError, and AttributeError if it lacks one of them."""
    _share_openmp()
    found = ctypes.CDLL(str(file))
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, f"getp_{name}")
        function.argtypes, function.restype = arguments, None
    return found


def fixed_point() -> bool:
    """Whether the kernels take bf16 weights as 16-bit integers with scales: see fixed.h."""
    kernels = library()
    return kernels is not None and bool(kernels.getp_fixed_point())


def _say(reason: str) -> None:
    if plain.lacks_bfloat16():
        reason += "; on this processor --dtype float32 is then faster, with twice the memory"
    warnings.warn(f"slower without the native CPU kernels: {reason}", stacklevel=3)


def _share_openmp() -> None:
    """Make torch's OpenMP runtime visible to the kernels, which are linked to none.

    Two runtimes in one process would each keep threads spinning against the other's.
    """
    names = ("libgomp", "libiomp5", "libomp")
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    loaded = {line.split()[-1] for line in lines if Path(line.split()[-1]).name.startswith(names)}
    own = [path for path in loaded if "torch" in path] or [*loaded, "libgomp.so.1"]
    ctypes.CDLL(own[0], mode=ctypes.RTLD_GLOBAL)


_recorder: "Recorder | None" = None


def call(op: str, *arguments: Any) -> None:
    """Call a kernel; the arguments are those of its C function."""
    kernels = library()
    getattr(kernels, f"getp_{op}")(*arguments)
    if _recorder is not None:
        _recorder.note(op, arguments)


def leave_to_torch() -> None:
    """To be called before torch computes an op: RuntimeError if that is being recorded."""
    if _recorder is not None:
        raise RuntimeError("an op of the decoder is not one of the native kernels")


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory for a kernel's result."""
    if _recorder is not None:
        return _recorder.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype)


class Recorder:
    """Records what a computation calls, to do the same again in one call.

    Between kernels Python costs more than a small kernel does, the more so as weights that stream
    by push it out of the caches. Everything that the computation does must be kernels, over
    memory that stays where it is; RuntimeError if an op is left to torch.
    """

    def __init__(self) -> None:
        self._buffers: list[mmap.mmap] = []  # of all recordings: only one runs at a time
        self._by_size: list[int] = []  # their places, the smallest buffer's first
        self._calls: list[list[int]] = []

    def __call__(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Compute, and return what gives the result: that of now the first time, then anew."""
        global _recorder
        kernels = library()
        assert kernels is not None
        self._calls = []
        _recorder = self
        try:
            result = compute()
        finally:
            _recorder = None
        record = struct.Struct(f"{_MOST_ARGUMENTS + 1}q")
        unused = [0] * (_MOST_ARGUMENTS + 1)
        recorded = b"".join(record.pack(*(c + unused)[: len(unused)]) for c in self._calls)
        count, shape, dtype = len(self._calls), result.shape, result.dtype
        found = [i for i, b in enumerate(self._buffers) if _address(b) == result.data_ptr()]
        if not found:
            raise RuntimeError("the result is not of the native kernels")
        place = found[0]  # not the buffer: other recordings may use it, too
        first: torch.Tensor | None = result

        def again() -> torch.Tensor:
            nonlocal first
            if first is not None:
                out, first = first, None
                return out
            kernels.getp_replay(recorded, count)
            return pages.tensor(self._buffers[place], shape, dtype)

        return again

    def note(self, op: str, arguments: tuple[Any, ...]) -> None:
        """Keep a call."""
        plain = [_OPS[op]]
        for value, kind in zip(arguments, _SIGNATURES[op], strict=True):
            if kind is _Float:
                plain.append(struct.unpack("i", struct.pack("f", value))[0])
            else:
                plain.append(0 if value is None else int(value))
        self._calls.append(plain)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory that nothing else of this recording uses while the tensor or a view lives."""
        size = math.prod(shape) * dtype.itemsize
        for i in self._by_size[bisect_left(self._by_size, size, key=self._size) :]:
            if sys.getrefcount(self._buffers[i]) == 2:  # the list and the argument: no tensor
                break
        else:
            i = len(self._buffers)
            self._buffers.append(pages.memory(size))
            insort(self._by_size, i, key=self._size)
        return pages.tensor(self._buffers[i], shape, dtype)

    def _size(self, place: int) -> int:
        return len(self._buffers[place])


def _address(buffer: mmap.mmap) -> int:
    return torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
