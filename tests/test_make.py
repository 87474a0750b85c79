"""`make getp`, the first command of a new user: its installation and its output in the README."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Stands for Python: `-m venv .venv` makes a pip that prints its arguments, and a python.
FAKE_PYTHON = """\
#!/bin/sh
mkdir -p .venv/bin
printf '#!/bin/sh\\necho "pip $*"\\n' > .venv/bin/pip
printf '#!/bin/sh\\necho "python $*"\\n' > .venv/bin/python
chmod +x .venv/bin/pip .venv/bin/python
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", [".venv/getp", ".venv/test"])
def test_installation_says_what_it_does_and_lets_pip_show_its_progress(
    tmp_path: Path, target: str
) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "fake-python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    make = ["make", "--no-print-directory", f"PYTHON={fake}", target]
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Installing torch, then getp, into .venv: pip shows")
    installs = [line for line in lines if line.startswith("pip install")]
    assert installs[0].endswith(" torch")
    assert len(installs) == 2
    for line in installs:
        assert not re.search(r" (-q|--quiet|--progress-bar[= ]off)\b", line)


def readme_sample() -> list[str]:
    """Return the lines of the README's block with the output of `make getp`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    (sample,) = (block for block in blocks if "elapsed time(s)" in block)
    return list(sample.splitlines())


def stable(lines: list[str]) -> list[str]:
    """Return the parts of an output that do not depend on the machine and its load.

    Of the table these are the labels and the number of requests; elsewhere everything but numbers
    and the path of Python. Whether this machine was measured before does not matter.
    """
    found = []
    for line in lines:
        cells = [cell.strip() for cell in re.split("[│┃]", line)]
        if len(cells) > 1:  # a row; without a label it continues the row above
            requests = [cells[2]] if cells[1] == "requests" else []
            found += [cells[1], *requests] if cells[1] else []
        elif not re.match("[┌└├┏┗┡]|getp: measuring", line):
            line = re.sub(r"^( +)\S+ run\.py", r"\1PYTHON run.py", line.rstrip())
            found.append(re.sub(r"\d[\d.,]*", "#", line))
    return found


def test_readme_shows_what_make_getp_prints(tmp_path: Path) -> None:
    """If this fails, replace the README's block by the output of `COLUMNS=100 make getp`.

    It is that of the first run, which measures the machine.
    """
    command, *expected = readme_sample()
    recipe = re.search(r"^getp:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    assert command == recipe[1]
    for name in ("run.py", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, *command.split()[1:]],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=True,
    )
    assert stable(done.stdout.splitlines()) == stable(expected)
