"""Measure this machine: the Device called `local`, stored with its date in the user's cache.

With `measure_rates` the only module of the cost model that imports torch.
"""

import datetime
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.cost.devices import Device, device_of_driver
from model.cost.measure_rates import measure_rates
from model.cost.rates import Rates
from model.formats import DENSE
from model.ops.backend import choose_backend
from model.ops.specs import Linear
from model.user_cache import read_object, write_object

_CACHE = "hardware.json"
_LONG_ENOUGH_S = 0.05  # longer products have a negligible start-up time
_SMALLEST_PRODUCT, _BIGGEST_PRODUCT = 256, 8192
_RUNS_KEY = "runs"  # in the cache, beside the machines
_RUNS = 3  # the fastest counts: a peak is the speed of an undisturbed machine


@dataclass(frozen=True)
class Measured:
    """A measured device and the ISO date of its measurement."""

    device: Device
    date: str
    hardware: str  # the name that the driver or the processor reports

    def is_a(self, device: Device) -> bool:
        """Return whether the measured machine is this known device."""
        return device_of_driver(self.hardware) == device


def local_device(target: torch.device | None = None, remeasure: bool = False) -> Measured:
    """Return the device from the cache, or measure it (several seconds).

    target None: the GPU if there is one, else the CPU. remeasure: ignore the cache.
    """
    target = target or default_target()
    found = None if remeasure else cached_device(target)
    if found is None:
        entry = measure(target)
        write_cache({**read_cache(), cache_key(target): entry})
        found = _parse(entry, hardware_name(target))
        assert found is not None  # `measure` has just returned it
    return found


def cached_device(target: torch.device | None = None) -> Measured | None:
    """Return the device from the cache; None if it was never measured."""
    target = target or default_target()
    return _parse(read_cache().get(cache_key(target)), hardware_name(target))


def default_target() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _run_key(target: torch.device, model: str) -> str:
    return f"{model} on {cache_key(target)}"


def cache_key(target: torch.device) -> str:
    """Return the cache key of a device: hardware, CPU threads and torch version."""
    threads = f", {torch.get_num_threads()} threads" if target.type == "cpu" else ""
    return f"{hardware_name(target)}{threads}, torch {torch.__version__}"


def store_efficiency(target: torch.device, model: str, share: float) -> None:
    """Store the share of the device limit that a run of `model` achieved, for predictions."""
    cache = read_cache()
    runs = cache.get(_RUNS_KEY)
    date = datetime.date.today().isoformat()
    entry = {_run_key(target, model): {"share": share, "date": date}}
    write_cache({**cache, _RUNS_KEY: {**(runs if isinstance(runs, dict) else {}), **entry}})


def recorded_efficiency(device: Device, model: str) -> tuple[float, str] | None:
    """Return the share of the limit that the last run of `model` achieved here, and its date.

    None if there was no run, or if `device` is not the device of this machine.
    """
    target = default_target()
    if device.name != "local" and device_of_driver(hardware_name(target)) != device:
        return None
    try:
        entry = read_cache()[_RUNS_KEY][_run_key(target, model)]
        share, date = float(entry["share"]), str(entry["date"])
    except (TypeError, KeyError, ValueError):
        return None
    return (min(share, 1.0), date) if share > 0 else None


def measure(target: torch.device) -> dict[str, Any]:
    """Measure what `measure_peaks` does, and on a CPU also the rates of the kernels."""
    rates = measure_rates(target).as_json() if target.type == "cpu" else None
    return {**measure_peaks(target), "rates": rates}


def measure_peaks(target: torch.device) -> dict[str, Any]:
    """Measure peak FLOP/s of matrix products by dtype, read bandwidth and launch time."""
    dtypes = ["float32", "bfloat16", *(["float16"] if target.type == "cuda" else [])]
    return {
        "date": datetime.date.today().isoformat(),
        "peaks": {dtype: _product_rate(target, getattr(torch, dtype)) for dtype in dtypes},
        "bandwidth": _read_rate(target),
        "launch_s": _launch_time(target),
        "memory": _memory(target),
    }


def hardware_name(target: torch.device) -> str:
    """Return the name that the GPU or the processor reports."""
    if target.type == "cuda":
        return torch.cuda.get_device_name(target)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _best(function: Callable[[], Any], target: torch.device, runs: int = _RUNS) -> float:
    """Return the seconds of the fastest run, after one to warm up."""
    times = []
    for _ in range(runs + 1):
        _wait(target)
        start = time.perf_counter()
        function()
        _wait(target)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _product_rate(target: torch.device, dtype: torch.dtype) -> float:
    """Return the best FLOP/s of square products, by torch or on a CPU by our own kernels."""
    rate = _linear_rate(target, dtype, lambda a: partial(torch.nn.functional.linear, a, a))
    if target.type == "cpu":  # getp's kernels may be faster than torch's
        own = _linear_rate(target, dtype, lambda a: _own_linear(target, dtype, a))
        rate = max(rate, own)
    return rate


def _own_linear(
    target: torch.device, dtype: torch.dtype, a: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Return the product of a square matrix with itself by the backend's own linear."""
    backend = choose_backend(target, dtype)
    weight = backend.empty_weight(tuple(a.shape))
    weight[0 : len(a)].copy_(a)
    linear = Linear(
        a.shape[1], a.shape[0], has_bias=False, format=DENSE, weight=backend.pack(weight)
    )
    return partial(backend.linear, a, linear)


def _linear_rate(
    target: torch.device,
    dtype: torch.dtype,
    product: Callable[[torch.Tensor], Callable[[], torch.Tensor]],
) -> float:
    """Return the best FLOP/s over growing sizes, up to the first product of _LONG_ENOUGH_S."""
    size, rate = _SMALLEST_PRODUCT, 0.0
    while True:
        seconds = _best(product(torch.randn(size, size, device=target).to(dtype)), target)
        rate = max(rate, 2 * size**3 / seconds)
        if seconds > _LONG_ENOUGH_S or size >= _BIGGEST_PRODUCT:
            return rate
        size *= 2


def _read_rate(target: torch.device) -> float:
    """Return the bytes per second of a sum over more data than any cache holds."""
    values = torch.zeros((1 << 30 if target.type == "cuda" else 1 << 28) // 4, device=target)
    return values.numel() * 4 / _best(values.sum, target)


def copy_rate(target: torch.device) -> float:
    """Return the bytes per second, read plus written, of a copy larger than any cache."""
    size = 1 << 30 if target.type == "cuda" else 1 << 28
    source = torch.zeros(size, dtype=torch.uint8, device=target)
    copied = torch.empty_like(source)
    return 2 * size / _best(lambda: copied.copy_(source), target)


def _launch_time(target: torch.device, launches: int = 1000) -> float:
    """Return the seconds per launch of a minimal operation."""
    value = torch.zeros(1, device=target)

    def launch() -> None:
        for _ in range(launches):
            value.add_(1)

    return _best(launch, target) / launches


def _memory(target: torch.device) -> int:
    if target.type == "cuda":
        return int(torch.cuda.get_device_properties(target).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 8 << 30


def _wait(target: torch.device) -> None:
    if target.type == "cuda":
        torch.cuda.synchronize(target)


def _parse(entry: Any, hardware: str) -> Measured | None:
    """Return a cache entry as a Device; None if it is not valid."""
    try:
        peaks = {str(dtype): float(peak) for dtype, peak in entry["peaks"].items()}
        device = Device(
            "local",
            peaks,
            vector=peaks["float32"],
            special=peaks["float32"] / 16,
            bandwidth=float(entry["bandwidth"]),
            memory=int(entry["memory"]),
            source=f"measured on {hardware}, {entry['date']}",
            launch_s=float(entry["launch_s"]),
            rates=None if entry["rates"] is None else Rates.parse(entry["rates"]),
        )
        return Measured(device, str(entry["date"]), hardware)
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def read_cache() -> dict[str, Any]:
    """Return the cache; empty if there is none or it is damaged."""
    return read_object(_CACHE)


def write_cache(cache: dict[str, Any]) -> None:
    """Write the cache if possible; without it the next run measures again."""
    write_object(_CACHE, cache)
