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
        files = list((ROOT / package).rglob("*.py"))
        if package == "run":
            files = [ROOT / "run.py", ROOT / "getp_command.py"]
        assert files
        for path in files:
            packages = {name.split(".")[0] for name in imports(path)} & MAY_IMPORT.keys()
            assert packages <= allowed | {package}, path


def test_ops_do_not_import_the_decoder() -> None:
    for path in (ROOT / "model" / "ops").rglob("*.py"):
        for name in imports(path):
            if name.startswith("model."):
                assert name.startswith(("model.ops", "model.ops.forward_batch")), f"{path}: {name}"


_PRINT_SPIN_COUNT = """
import os, sys
class Finder:
    def find_spec(name, *rest):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Finder)
import {module}
"""


@pytest.mark.parametrize(
    "module",
    [
        "engine.engine",
        "getp.job.run",
        "getp.cluster.replica",
        "getp.analysis.profile",
        "benchmarks.throughput",
    ],
)
def test_thread_wait_policy_is_set_before_torch_is_imported(module: str) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    cases: list[tuple[dict[str, str], str]] = [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ]
    for given, expected in cases if module == "engine.engine" else cases[:1]:
        run = [sys.executable, "-c", _PRINT_SPIN_COUNT.format(module=module)]
        done = subprocess.run(run, cwd=ROOT, env=env | given, capture_output=True, text=True)
        assert done.stdout.split() == [expected], done.stderr


def test_no_warning_is_printed_without_numpy(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\")")
    done = subprocess.run(
        [sys.executable, "-c", "import getp.cli.main, model.cost.measure"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


def test_packages_import_neither_transformers_nor_numpy() -> None:
    for package in MAY_IMPORT.keys() - {"run"}:
        for path in (ROOT / package).rglob("*.py"):
            names = {name.split(".")[0] for name in imports(path)}
            assert not names & {"transformers", "numpy"}, path
