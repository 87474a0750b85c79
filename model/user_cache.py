"""The folder in which getp keeps what it has measured on this machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `getp` in the user's cache folder, which XDG_CACHE_HOME names or is ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "getp"
