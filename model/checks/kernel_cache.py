"""The kernels verified and measured on this machine, stored in the user's cache directory."""

import hashlib
import json
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from model import ops
from model.checks.verify import Kernels, Verifier
from model.cost.measure import hardware_name
from model.user_cache import read_object, write_object

_FILE = "kernels.json"


def key_of(verifier: Verifier) -> str:
    """Return everything that results and times of kernels depend on, as a key of the cache."""
    backend, name = verifier.backend, hardware_name(verifier.backend.device)
    parts = {
        "device": name,
        "driver": driver_version(),
        "torch": str(torch.__version__),
        "kernels": backend.kernels(name),
        "sources": _sources(),
        "dtype": str(backend.dtype).removeprefix("torch."),
        "shapes": _shapes(verifier),
    }
    return json.dumps(parts)


def driver_version() -> str:
    """Return the version of the GPU's driver; the kernel's where the driver comes with it."""
    for vendor in ("nvidia", "amdgpu"):
        try:
            return Path(f"/sys/module/{vendor}/version").read_text().strip()
        except OSError:
            continue
    return platform.release()


def _sources() -> str:
    """Return a hash of the sources of operations and of the checks."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in (Path(ops.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _shapes(verifier: Verifier) -> str:
    """Return a hash of what the cases depend on besides the device."""
    config = replace(
        verifier.config,
        layers=tuple(dict.fromkeys(verifier.config.layers)),
        stop_ids=frozenset(),
        max_positions=0,
    )
    described = repr((config, verifier.shard.size, verifier.block_size))
    return hashlib.blake2b(described.encode(), digest_size=8).hexdigest()


def remembered(verifier: Verifier) -> Kernels | None:
    """Return the kernels of an earlier run; None if there are none, or none that can be used."""
    entry: Any = read_object(_FILE).get(key_of(verifier))
    try:
        kernels = Kernels(dict(entry["choices"]), dict(entry["replaced"]), tuple(entry["measured"]))
        verifier.backend.with_choices(kernels.choices)
    except (TypeError, KeyError, ValueError):
        return None
    texts = (*kernels.replaced, *kernels.replaced.values(), *kernels.measured)
    return kernels if all(isinstance(text, str) for text in texts) else None


def remember(verifier: Verifier, kernels: Kernels) -> None:
    """Store the kernels for later runs, if possible."""
    entry: dict[str, Any] = asdict(kernels)
    write_object(_FILE, {**read_object(_FILE), key_of(verifier): entry})
