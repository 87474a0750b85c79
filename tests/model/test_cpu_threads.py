"""The threads of the CPU kernels: work is taken over from a thread that is away."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from model.ops.cpu import bindings

_KERNELS = Path(bindings.__file__).parent / "kernels"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checks of team_check.cpp."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path_factory.mktemp("team") / "check"
    sources = [Path(__file__).with_name("team_check.cpp"), _KERNELS / "threads" / "team.cpp"]
    options = ["-std=c++17", "-O1", "-pthread", "-Wall", "-Werror", f"-I{_KERNELS}"]
    subprocess.run([compiler, *options, *sources, "-o", program], check=True)
    return program


@pytest.mark.parametrize("check", ["worker", "leader", "random", "callers", "fork", "nodes"])
def test_each_piece_is_computed_once_whoever_is_away(program: Path, check: str) -> None:
    done = subprocess.run([program, check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_threads_ask_for_short_turns(program: Path) -> None:
    done = subprocess.run([program, "turns"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    if not version or (int(version[1]), int(version[2])) < (6, 12):
        pytest.skip("Linux before 6.12 ignores the length of turns")
    assert not done.stdout
