"""The lists in pyproject.toml, from which packages are built, name every file that is needed."""

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "model" / "ops" / "cpu" / "kernels"


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    tool: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    return tool["setuptools"]


def _found(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in KERNELS.rglob(pattern))


def test_the_native_library_lists_all_its_files(settings: dict[str, Any]) -> None:
    (library,) = settings["ext-modules"]
    assert sorted(library["sources"]) == _found("*.cpp")
    assert sorted(library["depends"]) == _found("*.h")  # without them no source archive builds


def test_all_packages_are_listed(settings: dict[str, Any]) -> None:
    packages = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in ("getp", "engine", "model", "tokenizer")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(settings["packages"]) == packages | {"getp.data"}
