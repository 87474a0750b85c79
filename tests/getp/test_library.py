"""getp as a library: lazy imports, and a clear error if a user's file hides one of its packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import getp

ROOT = Path(__file__).parents[2]

EXAMPLE = """
from getp import Engine, EngineConfig, Request, SamplingParams, Tokenizer

tokenizer = Tokenizer.load("data/model")
prompts = ["12+7=", "3+4="]
params = SamplingParams(max_new_tokens=8)
with Engine("data/model", EngineConfig(device="cpu", dtype="float32")) as engine:
    requests = [Request(tokenizer.encode(text), params, i) for i, text in enumerate(prompts)]
    answers = {done.request_id: done.token_ids for done in engine.generate(requests)}
for index in sorted(answers):
    print(tokenizer.decode(answers[index]))
"""


def python(program: str, folder: Path = ROOT, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_readme_example_completes_prompts() -> None:
    done = python(EXAMPLE)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_import_of_getp_loads_neither_torch_nor_the_command_line() -> None:
    done = python("import sys, getp; print('torch' in sys.modules, 'click' in sys.modules)")
    assert done.stdout == "False False\n", done.stderr


def test_every_exported_name_can_be_imported_and_is_listed() -> None:
    for name in getp.__all__:
        assert getattr(getp, name) is not None
    assert set(getp.__all__) <= set(dir(getp))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = getp.Nonsense


@pytest.mark.parametrize("name", ["engine", "model", "tokenizer"])
@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("file", "import getp"),
        ("package", "from getp import Engine"),
        ("folder", "import getp.cli.main"),
    ],
)
def test_error_names_a_file_that_hides_a_package(
    tmp_path: Path, name: str, kind: str, use: str
) -> None:
    hiding = tmp_path / (f"{name}.py" if kind == "file" else name)
    if kind == "file":
        hiding.write_text("")
    else:
        hiding.mkdir()
    if kind == "package":
        (hiding / "__init__.py").write_text("")
    # getp itself is found behind the user's folder, as an installed package is.
    path = "import sys; sys.path.append(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", f"{path}; {use}", str(ROOT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if kind == "folder" and done.returncode == 0:
        return  # Python prefers a package that is found later to a folder without __init__.py
    last = done.stderr.splitlines()[-1]
    assert f"hides getp's package '{name}': rename it" in last
    assert str(hiding) in last


@pytest.mark.parametrize("name", ["engine", "model", "tokenizer"])
def test_error_names_an_already_imported_module_that_hides_a_package(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / f"{name}.py").write_text("")
    program = f"import sys, {name}; sys.path[:] = [{str(ROOT)!r}, *sys.path[1:]]; import getp"
    done = python(program, tmp_path)
    assert f"hides getp's package '{name}'" in done.stderr


@pytest.mark.parametrize("name", ["engine", "model", "tokenizer"])
def test_run_py_and_the_command_work_beside_a_users_file(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("raise SystemExit('imported by mistake')")
    script = [sys.executable, str(ROOT / "run.py"), "--version"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == f"getp {getp.__version__}\n", done.stderr
    command = tmp_path / "bin" / "getp"  # as pip writes it
    command.parent.mkdir()
    command.write_text("import sys\nfrom getp.cli.main import main\nsys.exit(main())\n")
    done = subprocess.run(
        [sys.executable, str(command), "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"getp {getp.__version__}\n", done.stderr


@pytest.mark.parametrize("name", ["engine", "model", "tokenizer"])
def test_error_names_a_file_on_the_python_path_that_hides_a_package(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / f"{name}.py").write_text("")
    command = [sys.executable, "-m", "getp", "--version"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"hides getp's package '{name}': rename it" in done.stderr
