"""Finds the model and the GPUs of a plan by their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from getp.errors import UsageProblem
from getp.hub import model_name
from getp.terminal import warn
from model.config import ModelConfig, read_json
from model.cost.devices import DEVICES, Device, UnknownDeviceError, find_device
from model.cost.known_models import (
    KNOWN_CONFIGS,
    closest_known_models,
    find_known_model,
    named_config,
)
from model.families import load_config, parse_config
from model.gguf import is_gguf

LOCAL = "local"
DEFAULT_GPUS = ("A100 SXM 80GB", "H100 SXM", "H200", "B200", "MI300X", "MI355X")


@dataclass(frozen=True)
class Model:
    """A model to plan for: its display name and its config."""

    name: str
    config: ModelConfig

    @property
    def changes(self) -> list[str]:
        """Return the quantization and the KV cache's dtype in words, where they were asked for."""
        form, kv = self.config.quantization, self.config.kv_dtype
        found = [f"quantized to {form}"] if form else []
        return found if kv == "auto" else [*found, f"KV cache in {kv}"]


def is_known(name: str) -> bool:
    """Return whether this is the name of a well-known model, whose config comes with getp."""
    return find_known_model(name) is not None


def find_model(given: Path) -> Model:
    """Return a model by checkpoint, config.json or the usual spelling of its name.

    Raises UsageProblem, which names the closest ones, for anything else, and CheckpointError for
    a config that cannot be used.
    """
    if given.is_dir() or is_gguf(given):
        return Model(model_name(given), load_config(given, warn))
    if given.exists():
        return Model(model_name(given.parent), parse_config(read_json(given), given))
    name = find_known_model(str(given))
    if name is None:
        raise unknown_model(str(given), "A checkpoint directory or a config.json also works")
    return Model(name, named_config(name))


def unknown_model(name: str, addition: str) -> UsageProblem:
    """Return the error for a name that is not known, with the closest ones and one more remark."""
    closest = ", ".join(closest_known_models(name))
    names = f"did you mean {closest}?" if closest else f"known: {', '.join(KNOWN_CONFIGS)}."
    return UsageProblem(f"unknown model {name!r}; {names} {addition}")


def find_gpus(names: Sequence[str]) -> list[Device]:
    """Return the named devices, without repetition; DEFAULT_GPUS if no name is given.

    A name may be `all` or `local`, or several names with commas. Raises UsageProblem for an unknown
    one.
    """
    words = [word.strip() for name in names for word in name.split(",")]
    devices: dict[str, Device] = {}
    for word in words or DEFAULT_GPUS:
        for device in DEVICES if word.lower() == "all" else [_find_gpu(word)]:
            devices[device.name] = device
    return list(devices.values())


def measure_again() -> None:
    """Measure this machine, even if it was measured before."""
    from getp.machine import local_device

    local_device(remeasure=True)


def _find_gpu(name: str) -> Device:
    if name.lower() == LOCAL:
        from getp.machine import local_device

        return local_device().device
    try:
        return find_device(name)
    except UnknownDeviceError as error:
        raise UsageProblem("{gpu}: {reason}", reason=error) from None
