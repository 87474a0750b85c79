"""Imports inside getp go one way, modules form no cycle, and folders stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("getp", "engine", "model", "tokenizer")
MAX_FILES = 14  # source files in a folder, beside __init__.py

# Subpackages of getp, each with the subpackages that it may import. Modules at getp's root and in
# getp/text are shared; getp's __init__ may name what it exports.
SHARED = "shared"
MAY_IMPORT = {
    "cli": {"job", "openai", "score", "serve", "analysis", "cluster", "report", SHARED},
    "score": {"job", "openai", SHARED},
    "serve": {"job", "report", "openai", SHARED},
    "library": {"openai", SHARED},
    "analysis": {"job", "report", "openai", SHARED},
    "cluster": {"report", SHARED},
    "job": {"report", "openai", SHARED},
    "openai": {SHARED},
    "report": {SHARED},
    SHARED: {SHARED},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The product's modules that these import statements load."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name in FILES:
                yield name


def all_nodes(module: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(FILES[module].read_text()))


def module_level_nodes(module: str) -> Iterator[ast.AST]:
    """The statements that an import of the module executes: no functions, no TYPE_CHECKING."""
    pending: list[ast.AST] = [ast.parse(FILES[module].read_text())]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)


def subpackage(module: str) -> str:
    parts = module.split(".")
    if parts[-1] == "__main__":  # `python -m getp` is the command line
        return "cli"
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else SHARED


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_subpackages_of_getp_import_only_those_below_them(name: str) -> None:
    for module in FILES:
        if not module.startswith("getp.") or subpackage(module) != name:
            continue
        for other in imported(all_nodes(module)):
            if other.startswith("getp.") and subpackage(other) != name:
                assert subpackage(other) in MAY_IMPORT[name], f"{module} imports {other}"


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def test_cycles_returns_strongly_connected_modules() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]


def test_no_modules_import_each_other_in_a_cycle() -> None:
    # A package's __init__ and its own modules may name each other: that is how it exports them.
    graph = {
        module: {
            other
            for other in imported(module_level_nodes(module))
            if other != module and not module.startswith(f"{other}.")
        }
        for module in FILES
    }
    assert cycles(graph) == []


def test_folders_have_at_most_14_source_files() -> None:
    folders: dict[Path, list[str]] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.suffix in {".py", ".c", ".cpp", ".h"} and path.name != "__init__.py":
                folders.setdefault(path.parent, []).append(path.name)
    too_full = {
        str(folder.relative_to(ROOT)): sorted(names)
        for folder, names in folders.items()
        if len(names) > MAX_FILES and folder != ROOT / "model" / "families"  # a file a family
    }
    assert not too_full


_JOB = """
import sys
from getp.cli.main import run
status = run(["-m", "getp", "-i", sys.argv[1], "-o", sys.argv[2], "--max-new-tokens", "2"])
loaded = {name for name in sys.modules if name == "ray" or name.startswith("getp.cluster")}
sys.exit(status or (str(loaded) if loaded else 0))
"""


def test_a_job_without_replicas_imports_neither_ray_nor_the_cluster(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("1\nWhat is 1 plus 2?\n")
    files = [str(tmp_path / "in.txt"), str(tmp_path / "out.txt")]
    done = subprocess.run(
        [sys.executable, "-c", _JOB, *files], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.txt").read_text().strip()
