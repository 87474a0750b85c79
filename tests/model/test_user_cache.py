"""The folder of measurements, where it cannot be used."""

from pathlib import Path

import pytest

from model import user_cache
from model.user_cache import read_object, write_object


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    write_object("a.json", {"b": [1]})
    assert read_object("a.json") == {"b": [1]}
    assert [file.name for file in (tmp_path / "new/getp").iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\xff", '{"a": 1}{'])
def test_a_damaged_file_is_empty(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "getp").mkdir()
    (tmp_path / "getp/a.json").write_text(text, encoding="latin-1")
    assert read_object("a.json") == {}


def test_a_folder_that_cannot_be_made_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only disk refuses to remove a file that is not there, and so does this."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    write_object("a.json", {})
    assert read_object("a.json") == {}


def test_a_user_without_home_folder_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as a user that it does not know."""

    def fails() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(user_cache.Path, "home", fails)
    write_object("a.json", {})
    assert read_object("a.json") == {}
