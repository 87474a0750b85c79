"""Finds and loads the library of native kernels (`kernels/`) and binds its functions.

The library is built when getp is installed with a C++ compiler. It uses one instruction set: the
fastest of this processor, or the one that the environment variable GETP_CPU_KERNELS names.
"""

import ctypes
import functools
import os
import platform
import struct
import warnings
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from model.ops.cpu import onednn
from model.ops.cpu.topology import topology

VARIABLE = "GETP_CPU_KERNELS"
LEVELS = ("none", "avx2", "avx_vnni", "vnni", "avx512", "amx")
"""Values of the variable, numbered as in kernels/dispatch.cpp: torch alone, AVX2 (other
architectures: the compiler's vectors), AVX2 with AVX-VNNI, AVX-512 with VNNI, AVX-512 with BF16,
and that with AMX. With avx2 (on x86), avx_vnni and vnni, linears multiply 16-bit integers."""

_COPY_S = 60  # a copy of a folder may get the times of copying, in any order


class KernelsError(ValueError):
    """GETP_CPU_KERNELS names kernels that are not available, or the library is out of date."""


# Letters of kernels/table.h: the type, and the format in which `struct` packs it into 8 bytes.
_ARGUMENT_TYPES: dict[str, tuple[Any, str]] = {
    "p": (ctypes.c_void_p, "q"),
    "q": (ctypes.c_int64, "q"),
    "i": (ctypes.c_int32, "i4x"),
    "?": (ctypes.c_bool, "?7x"),
    "f": (ctypes.c_float, "f4x"),
}


class _Function(ctypes.Structure):
    """Function of kernels/table.h."""

    _fields_ = [
        ("name", ctypes.c_char_p), ("types", ctypes.c_char_p), ("address", ctypes.c_void_p),
        ("replay", ctypes.c_void_p),
    ]  # fmt: skip


class _Table(ctypes.Structure):
    """Kernels of kernels/table.h."""

    _fields_ = [
        ("functions", ctypes.POINTER(_Function)), ("count", ctypes.c_int64),
        ("int16_weights", ctypes.c_int64),
    ]  # fmt: skip


def pack_call(index: int, types: str, arguments: tuple[Any, ...]) -> bytes:
    """Pack a call for `Kernels.replay`: the function's index and its arguments, 8 bytes each."""
    formats = "".join(_ARGUMENT_TYPES[letter][1] for letter in types)
    values = (0 if value is None else value for value in arguments)
    return struct.pack(f"=q{formats}", index, *values)


class CallRecorder(Protocol):
    """An object that receives each call of a native function."""

    def record_call(self, index: int, types: str, arguments: tuple[Any, ...]) -> None:
        """Record a call of the table's function `index`, whose arguments have these types."""


class Kernels:
    """The native functions of one instruction set, each an attribute: `kernels.linear(...)`.

    Names, types and order of the arguments are those of the C++ functions. Functions can be called
    once `library` has chosen an instruction set.
    """

    def __init__(self) -> None:
        self.level = "none"
        self.int16_weights = False
        """Whether bf16 weights are stored as 16-bit integers with scales: see gemm/int16.h."""
        self.recorder: CallRecorder | None = None
        self._library: ctypes.CDLL | None = None
        self._table: Any = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        # Only called for a name that is not bound.
        raise KernelsError(
            f"the native CPU kernels have no function {name!r}: they were built from other sources;"
            " run `pip install -e .` again"
        )

    @property
    def compresses(self) -> bool:
        """Whether there are products of compressed bf16 weights: see gemm/compressed.h."""
        return self.level == "avx512"

    @property
    def form(self) -> str:
        """The instruction set and the arithmetic of linears, on which rounding depends."""
        on_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
        level = self.level if on_x86 else f"portable ({platform.machine()})"
        return f"{level}, {'16-bit integers' if self.int16_weights else 'bfloat16'}"

    def use(self, library: ctypes.CDLL, level: str) -> None:
        """Bind the functions of a level that this processor supports."""
        self.level, self._library = level, library
        self._table = library.getp_kernels(LEVELS.index(level))
        table = self._table.contents
        self.int16_weights = bool(table.int16_weights)
        for index in range(table.count):
            function = table.functions[index]
            setattr(self, function.name.decode(), self._bind(index, function))

    def _bind(self, index: int, entry: _Function) -> Callable[..., None]:
        name, types, count = entry.name.decode(), entry.types.decode(), len(entry.types)
        prototype = ctypes.CFUNCTYPE(None, *(_ARGUMENT_TYPES[letter][0] for letter in types))
        function = prototype(entry.address)

        def call(*arguments: Any) -> None:
            # ctypes rejects missing arguments, but passes extra ones on.
            if len(arguments) != count:
                raise TypeError(f"{name} takes {count} arguments, not {len(arguments)}")
            function(*arguments)
            if self.recorder is not None:
                self.recorder.record_call(index, types, arguments)

        return call

    def replay(self, calls: bytes) -> None:
        """Repeat calls, each of them from `pack_call`."""
        assert self._library is not None
        self._library.getp_replay(self._table, calls, len(calls) // 8)


kernels = Kernels()
"""The native functions that are in use."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the native kernels and choose their instruction set; None if they cannot be used.

    The reason for None is given in one warning. Raises KernelsError if the environment names
    kernels that this processor does not have.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in LEVELS:
        raise KernelsError(f"{VARIABLE} must be {', '.join(LEVELS)}, not {wanted!r}")
    if wanted == "none":
        return None
    # Only the file of this Python: that of another Python may be built from older sources.
    files = [Path(__file__).with_name(f"_kernels{suffix}") for suffix in EXTENSION_SUFFIXES]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        _warn("they were not built; run `pip install -e .` where there is a C++ compiler")
        return None
    if is_outdated(file):
        _warn(f"{file.name} is older than its sources; run `pip install -e .` again")
        return None
    try:
        loaded = load(file)
    except (OSError, AttributeError) as error:
        _warn(f"{file.name} does not load ({error}); install again to build it anew")
        return None
    level = wanted or LEVELS[loaded.getp_best_level()]
    if wanted and not has_level(loaded, wanted):
        has = ", ".join(level for level in LEVELS if level == "none" or has_level(loaded, level))
        raise KernelsError(f"{VARIABLE} is {wanted}, but this processor only has {has}")
    if level == "none":
        _warn("this processor does not have AVX2, which they need")
        return None
    kernels.use(loaded, level)
    if len(topology().nodes) > 1:
        set_nodes(loaded, [[*chain(*cores)] for cores in topology().nodes.values()])
    return loaded


def is_outdated(file: Path) -> bool:
    """Whether sources in the folder `kernels` beside a library changed after it was built.

    Functions of another version can have the same arguments with another meaning, and then give
    wrong results without an error.
    """
    built = file.stat().st_mtime + _COPY_S
    sources = (each for each in file.with_name("kernels").rglob("*") if each.is_file())
    return any(source.stat().st_mtime > built for source in sources)


def load(file: Path) -> ctypes.CDLL:
    """Load a library of kernels. Raises OSError, and AttributeError if it is another library."""
    loaded = ctypes.CDLL(str(file))
    loaded.getp_has_level.argtypes = (ctypes.c_int,)
    loaded.getp_best_level.argtypes = ()
    loaded.getp_kernels.argtypes = (ctypes.c_int,)
    loaded.getp_kernels.restype = ctypes.POINTER(_Table)
    loaded.getp_replay.argtypes = (ctypes.POINTER(_Table), ctypes.c_char_p, ctypes.c_int64)
    loaded.getp_replay.restype = None
    loaded.getp_set_nodes.argtypes = (ctypes.POINTER(ctypes.c_int32), ctypes.c_int, ctypes.c_int)
    loaded.getp_set_nodes.restype = None
    return loaded


def set_nodes(loaded: ctypes.CDLL, nodes: list[list[int]]) -> None:
    """Divide the kernels' work among NUMA nodes, given as their CPUs; threads stay on them."""
    width = max(len(cpus) for cpus in nodes)
    cpus = [cpu for node in nodes for cpu in (*node, *[-1] * (width - len(node)))]
    loaded.getp_set_nodes((ctypes.c_int32 * len(cpus))(*cpus), len(nodes), width)


def has_level(loaded: ctypes.CDLL, level: str) -> bool:
    """Whether this processor supports a level of the library."""
    return bool(loaded.getp_has_level(LEVELS.index(level)))


def _warn(reason: str) -> None:
    if onednn.lacks_bfloat16():
        reason += "; on this processor dtype float32 is then faster, with twice the memory"
    warnings.warn(f"slower without the native CPU kernels: {reason}", stacklevel=3)
