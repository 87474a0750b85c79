"""The files, folders and commands that the documents name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "benchmarks/RESULTS.md",
    "data/README.md",
)
# A path in this repository: it ends with a slash or in a file name with a suffix.
_PATH = re.compile(
    r"(?<![\w./-])((?:getp|engine|model|tokenizer|data|tests|benchmarks)/[\w./-]*(?:/|\.\w+))"
)
_TEMPLATE = re.compile(r"NAME")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_to_files(name: str) -> None:
    document = ROOT / name
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
    for link in links:
        if "://" not in link:
            assert (document.parent / link).exists(), link


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_paths_exist(name: str) -> None:
    for path in _PATH.findall((ROOT / name).read_text(encoding="utf-8")):
        if not _TEMPLATE.search(path):
            assert (ROOT / path.rstrip(".")).exists(), path
