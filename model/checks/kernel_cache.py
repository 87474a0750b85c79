"""What was proved and measured on this machine, in the user's cache directory."""

import hashlib
import json
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from model import ops
from model.checks.prove import Kernels, Proof
from model.cost.measure import hardware_name
from model.user_cache import read_object, write_object

_FILE = "kernels.json"


def key_of(proof: Proof) -> str:
    """Return everything that results and times of kernels depend on, as a key of the cache."""
    backend, name = proof.backend, hardware_name(proof.backend.device)
    parts = {
        "device": name,
        "driver": driver_version(),
        "torch": str(torch.__version__),
        "kernels": backend.kernels(name),
        "sources": _sources(),
        "dtype": str(backend.dtype).removeprefix("torch."),
        "shapes": _shapes(proof),
    }
    return json.dumps(parts)


def driver_version() -> str:
    """Return the version of the GPU's driver as the kernel has it; else the kernel's own."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            return Path(file).read_text().splitlines()[0].strip()
        except (OSError, IndexError):
            continue
    return platform.release()


def _sources() -> str:
    """Return a hash of the sources of operations and of the checks."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in (Path(ops.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _shapes(proof: Proof) -> str:
    """Return a hash of what the cases depend on besides the device."""
    config = replace(
        proof.config,
        layers=tuple(dict.fromkeys(proof.config.layers)),
        stop_ids=frozenset(),
        max_positions=0,
    )
    described = repr((config, proof.shard.size, proof.block_size))
    return hashlib.blake2b(described.encode(), digest_size=8).hexdigest()


def remembered(proof: Proof) -> Kernels | None:
    """Return the kernels of an earlier run; None if there are none, or none that can be used."""
    entry: Any = read_object(_FILE).get(key_of(proof))
    try:
        kernels = Kernels(dict(entry["choices"]), dict(entry["replaced"]), tuple(entry["measured"]))
        proof.backend.with_choices(kernels.choices)
    except (TypeError, KeyError, ValueError):
        return None
    texts = (*kernels.replaced, *kernels.replaced.values(), *kernels.measured)
    return kernels if all(isinstance(text, str) for text in texts) else None


def remember(proof: Proof, kernels: Kernels) -> None:
    """Store the kernels for later runs, if possible."""
    entry: dict[str, Any] = asdict(kernels)
    write_object(_FILE, {**read_object(_FILE), key_of(proof): entry})
