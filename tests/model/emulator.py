"""The CPU kernels for AVX-512 and AMX on processors without them: their intrinsics as functions."""

import ctypes
import functools
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from model.ops.cpu import bindings as calls

_SOURCES = Path(calls.__file__).parent
_HERE = Path(__file__).parent
# What only a processor that has them can run, and what stands for it here.
_CHANGES = {
    "kernels.cpp": [
        # Not the kernels for AVX2, which take as long to compile as each of the others.
        (r'namespace narrow {\n#include "kernels.h"\n}\n#pragma GCC pop', "#pragma GCC pop"),
        (r"narrow::", "integers::"),
        (r"#include <immintrin.h>", '#include <immintrin.h>\n#include "emulator.h"'),
        (r"#pragma GCC target\([^)]*\)", '#pragma GCC target("avx2,fma,f16c,bmi2")'),
        (r"(int getp_has_level\(int wanted\) {)", r"\1 return wanted > 0;"),
    ],
    "kernels.h": [(r'asm\("" : "\+v"\(value\)\);', "")],
    "gemm_int16.h": [(r'asm\("vpdpwssd[^;]*;', "acc = emulated_vpdpwssd(acc, weights, pair);")],
    "attention.h": [],
}


@functools.cache
def emulated_library() -> ctypes.CDLL | None:
    """The kernels, whatever the processor; None without a compiler or on other architectures."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        return None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, changes in _CHANGES.items():
            text = (_SOURCES / file).read_text()
            for pattern, instead in changes:
                text, count = re.subn(pattern, instead, text)
                assert count, f"{file} has no {pattern}"
            (folder / file).write_text(text)
        shutil.copy(_HERE / "emulator.h", folder)
        command = [compiler, "-std=c++17", "-O1", "-mavx2", "-mfma", "-fopenmp", "-Wno-psabi", "-w"]
        command += ["-fPIC", "-shared", "-o", str(folder / "emulated.so")]
        subprocess.run([*command, str(folder / "kernels.cpp")], check=True)
        return calls.load(folder / "emulated.so")
