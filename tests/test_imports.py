"""Imports go one way: run → getp → engine → model → model.ops; tokenizer is a leaf."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "run": {"getp"},
    "getp": {"engine", "model", "tokenizer"},
    "engine": {"model"},
    "model": set[str](),
    "tokenizer": set[str](),
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_packages_import_only_what_is_below_them() -> None:
    for package, allowed in MAY_IMPORT.items():
        files = [ROOT / "run.py"] if package == "run" else list((ROOT / package).rglob("*.py"))
        assert files
        for path in files:
            ours = {name.split(".")[0] for name in imports(path)} & MAY_IMPORT.keys()
            assert ours <= allowed | {package}, path


def test_ops_know_nothing_of_the_decoder() -> None:
    for path in (ROOT / "model" / "ops").rglob("*.py"):
        for name in imports(path):
            if name.startswith("model."):
                assert name.startswith(("model.ops", "model.batch")), f"{path}: {name}"


_FINDER = """
import os, sys
class Finder:
    def find_spec(name, *rest):
        if name == "torch":
            print(os.environ["GOMP_SPINCOUNT"])
            sys.exit()
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize(
    "module", ["engine", "getp.batch", "getp.replica", "getp.profile", "benchmarks.throughput"]
)
def test_how_threads_wait_is_said_before_torch_is_loaded(module: str) -> None:
    code = f"{_FINDER}\nimport {module}"
    run = [sys.executable, "-c", code]
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, expected in (({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        done = subprocess.run(run, cwd=ROOT, env=env | given, capture_output=True, text=True)
        assert done.stdout.split() == [expected], done.stderr


def test_nothing_of_the_product_needs_transformers_or_numpy() -> None:
    for package in MAY_IMPORT.keys() - {"run"}:
        for path in (ROOT / package).rglob("*.py"):
            names = {name.split(".")[0] for name in imports(path)}
            assert not names & {"transformers", "numpy"}, path
