"""The choice of kernels on a simulated GPU, where torch is built for one."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(find_spec("nvidia") is None, reason="torch is not built for CUDA")
def test_kernels_that_do_not_compile_or_cannot_be_captured_are_replaced() -> None:
    program = "tests/engine/null_gpu_kernels.py"
    run = subprocess.run(
        [sys.executable, "benchmarks/null_gpu.py", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    right, not_compiled, not_captured = map(json.loads, run.stdout.splitlines())
    assert right == [{}, [], 3]
    assert not_compiled[0] == {"attention": "torch"}
    assert "RuntimeError: refused); used instead: plain torch" in not_compiled[1][0]
    assert not_captured[0] == {"route": "torch"}
    assert "RuntimeError: refused); used instead: plain torch" in not_captured[1][0]
