"""The folder in which getp stores measurements and kernel choices for this machine."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Return `getp` in the user's cache folder, which XDG_CACHE_HOME names or is ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "getp"


def read_object(name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the folder; empty if there is none or it is damaged."""
    try:
        found = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: nested too deep, or no home folder
        return {}
    return found if isinstance(found, dict) else {}


def write_object(name: str, value: dict[str, Any]) -> None:
    """Replace a file of the folder atomically, if possible."""
    try:
        file = cache_folder() / name
    except RuntimeError:  # no home folder
        return
    temporary = file.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=2), encoding="utf-8")
        os.replace(temporary, file)
    except OSError:
        # Where nothing can be written, a file that is not there cannot be removed either.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
