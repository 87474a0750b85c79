"""The CPU kernels for AVX-512 and AMX on other processors: intrinsics are replaced by functions."""

import ctypes
import fcntl
import functools
import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model.ops.cpu import bindings
from model.ops.cpu.bindings import kernels

_SOURCES = Path(bindings.__file__).parent / "kernels"
_EMULATOR = Path(__file__).with_name("emulator.h")
_CACHE = Path(__file__).parents[2] / ".pytest_cache"
_UNITS = ("dispatch.cpp", "units/vnni.cpp", "units/avx512.cpp", "threads/team.cpp")
# Code that needs a processor with the instruction set → its replacement.
_REPLACEMENTS = {
    "dispatch.cpp": [(r"(int getp_has_level\(int level\) {)", r"\1 return level > 0;")],
    "units/vnni.cpp": [
        (r"#pragma GCC target\([^)]*\)", '#pragma GCC target("avx2,fma,f16c,bmi2")')
    ],
    "units/avx512.cpp": [
        (r"#pragma GCC target\([^)]*\)", '#pragma GCC target("avx2,fma,f16c,bmi2")')
    ],
    "vectors.h": [(r'asm\("" : "\+v"\(value\)\);', "")],
    "gemm/int16_gemm.h": [
        (r'asm\("vpdpwssd[^;]*;', "acc = emulated_vpdpwssd(acc, weights, pair);")
    ],
    "gemm/int8/gemm.h": [(r'asm\("vpdpbusd[^;]*;', "sums = emulated_vpdpbusd(sums, codes, four);")],
}
# The emulated kernels for VNNI take the place of those for AVX2, with AVX-VNNI or without.
_OPTIONS = ["-std=c++17", "-O1", "-mavx2", "-mfma", "-pthread", "-fPIC", "-Wno-psabi", "-w"]
_OPTIONS += ["-Davx2_kernels=vnni_kernels", "-Davx_vnni_kernels=vnni_kernels"]
_OPTIONS += ["-include", str(_EMULATOR)]


@functools.cache
def emulated_library() -> ctypes.CDLL | None:
    """The kernels on any x86-64 processor; None without a compiler or on other architectures."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        return None
    _CACHE.mkdir(exist_ok=True)
    built = _CACHE / f"emulated-{_digest()}.so"
    with open(_CACHE / "emulated.lock", "w") as lock:  # one of several test processes builds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _build(compiler, built)
    return bindings.load(built)


def _digest() -> str:
    """Return a hash of everything that the library is built from."""
    files = [_EMULATOR, Path(__file__), *sorted(_SOURCES.rglob("*.h")), *_SOURCES.rglob("*.cpp")]
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _build(compiler: str, built: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "kernels"
        shutil.copytree(_SOURCES, folder)
        for file, replacements in _REPLACEMENTS.items():
            text = (folder / file).read_text()
            for pattern, replacement in replacements:
                text, count = re.subn(pattern, replacement, text)
                assert count, f"{file} does not contain {pattern}"
            (folder / file).write_text(text)
        units = [
            subprocess.Popen([compiler, *_OPTIONS, "-c", unit, "-o", f"{unit}.o"], cwd=folder)
            for unit in _UNITS
        ]
        assert [unit.wait() for unit in units] == [0] * len(units)
        objects = [f"{unit}.o" for unit in _UNITS]
        subprocess.run([compiler, "-shared", "-o", "emulated.so", *objects], cwd=folder, check=True)
        shutil.copy(folder / "emulated.so", built)


@contextmanager
def native_level(level: str) -> Iterator[None]:
    """Use the kernels of one instruction set, emulated if the processor does not have it."""
    loaded = bindings.library()
    if loaded is None:
        pytest.skip("the native kernels were not built here")
    library: ctypes.CDLL | None = loaded
    if not bindings.has_level(loaded, level):
        library = emulated_library()
    if library is None:
        pytest.skip(f"this processor does not have {level}, and it cannot be emulated here")
    usual = kernels.level
    kernels.use(library, level)
    try:
        yield
    finally:
        kernels.use(loaded, usual)
