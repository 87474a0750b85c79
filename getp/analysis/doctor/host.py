"""Checks of the installation and the disks, which need neither torch nor a kernel."""

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from getp import __version__
from getp.analysis.doctor.findings import Check, State
from getp.units import memory
from model.user_cache import cache_folder

MINIMUM = {"torch": (2, 11), "ray": (2, 60)}
"""The oldest versions that work, as pyproject.toml requires them."""
LEAST_FREE = 256 << 20
"""Bytes: a folder with less room will soon be full."""
_PROBE_BYTES = 1 << 20


def version_check() -> Check:
    """Check the versions of Python and of the packages on which results and speed depend."""
    found = {"Python": platform.python_version(), "getp": __version__}
    missing = []
    for name in ("torch", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if "torch" in missing:
        return Check(
            "versions", "failed", f"torch is not installed; {text}",
            "install the build of torch for your machine: see README.md", found,
        )  # fmt: skip
    if _numbers(found["torch"]) < MINIMUM["torch"]:
        oldest = ".".join(map(str, MINIMUM["torch"]))
        return Check(
            "versions", "failed", f"torch {found['torch']} is too old; {text}",
            f"install torch {oldest} or newer", found,
        )  # fmt: skip
    return Check("versions", "ok", text, figures=found)


def ray_check() -> Check:
    """Check Ray, which only replicas need. Does not import it, which takes a second."""
    package = "pip install 'getp[cluster]'"
    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError:
        return Check("Ray", "skipped", f"not installed; only replicas need it: {package}")
    figures = {"version": version}
    if _numbers(version) < MINIMUM["ray"]:
        oldest = ".".join(map(str, MINIMUM["ray"]))
        return Check(
            "Ray", "failed", f"{version} is too old: replicas need {oldest}", package, figures
        )
    return Check("Ray", "ok", version, figures=figures)


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version: 2.13.0+cpu → (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def temporary_folder() -> Path:
    """Return the folder that the environment names: `tempfile` ignores one that is not usable."""
    given = next(filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))), None)
    return Path(given or tempfile.gettempdir())


def hub_folder() -> Path:
    """Return the cache of models from the Hugging Face Hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def triton_folder() -> Path:
    """Return the folder in which Triton keeps compiled kernels."""
    given = os.environ.get("TRITON_CACHE_DIR")
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(given) if given else home / ".triton" / "cache"


@dataclass(frozen=True)
class Folder:
    """A folder that getp writes to."""

    use: str  # what is in it
    find: Callable[[], Path]
    variable: str  # of the environment, which sets it
    on_gpu: bool = False  # whether only a GPU needs it
    is_needed: bool = True  # whether it is a problem if it cannot be written


FOLDERS = (
    Folder("temporary files", temporary_folder, "TMPDIR"),
    Folder("measurements", cache_folder, "XDG_CACHE_HOME"),
    Folder("compiled kernels", triton_folder, "TRITON_CACHE_DIR", on_gpu=True),
    Folder("downloaded models", hub_folder, "HF_HOME", is_needed=False),  # it may be shared
)


def folder_check(folder: Folder) -> Check:
    """Check that files can be written to a folder, and that its disk has room.

    If it does not exist yet, its nearest existing parent is checked. Raises OSError.
    """
    path, use = folder.find(), folder.use
    existing = next(found for found in (path, *path.absolute().parents) if found.exists())
    free = shutil.disk_usage(existing).free
    figures = {"folder": str(path), "free": free}
    remedy = f"set {folder.variable} to a folder that can be written, on a disk with room"
    bad: State = "failed" if folder.is_needed else "skipped"
    if folder.find is temporary_folder and existing != path:
        return Check(use, bad, f"{path} does not exist", f"create it, or {remedy}", figures)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
    except OSError as error:
        finding = f"{path} cannot be written: {error.strerror or error}; {memory(free)} free"
        return Check(use, bad, finding, remedy, figures)
    if free < LEAST_FREE:
        finding = f"{path} has only {memory(free)} free"
        return Check(use, bad, finding, f"make room, or {remedy}", figures)
    return Check(use, "ok", f"{path}, {memory(free)} free", figures=figures)
