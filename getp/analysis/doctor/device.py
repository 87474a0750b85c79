"""Reports on the device, the native library and the rates; run in a child process."""

import os
import platform
import re
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from engine import EngineError
from engine.memory_plan import available_bytes
from engine.resolve import choose_device
from getp.analysis.doctor.reports import DeviceReport, LibraryReport, RatesReport
from model.checks.kernel_cache import driver_version
from model.cost import measure
from model.ops.cpu import bindings
from model.ops.triton.tiles import architecture_of


def find_device(name: str) -> tuple[torch.device, tuple[str, ...]]:
    """Return the device of a setting, and what torch says about GPUs that it cannot use.

    Raises EngineError if there is no such device.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            device = choose_device(name)
        except EngineError as error:
            messages = [str(error), *(str(warning.message) for warning in caught)]
            raise EngineError("{messages}", messages="; ".join(dict.fromkeys(messages))) from None
    return device, tuple(dict.fromkeys(str(warning.message) for warning in caught))


def describe_device(device: torch.device, notices: tuple[str, ...]) -> DeviceReport:
    """Describe a device; notices: as of `find_device`."""
    if device.type == "cpu":
        return DeviceReport(
            type="cpu",
            name=measure.hardware_name(device),
            count=torch.get_num_threads(),
            memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            free=available_bytes(device),
            torch_build=_torch_build(),
            architecture=platform.machine(),
            notices=notices,
        )
    properties = torch.cuda.get_device_properties(device)
    architecture = architecture_of(device)
    return DeviceReport(
        type="cuda",
        name=measure.hardware_name(device),
        count=torch.cuda.device_count(),
        memory=int(properties.total_memory),
        free=available_bytes(device),
        torch_build=_torch_build(),
        driver=driver_version(),
        architecture=architecture,
        processors=int(properties.multi_processor_count),
        is_built_for=is_built_for(architecture, torch.cuda.get_arch_list()),
        has_triton=find_spec("triton") is not None,
        notices=notices,
    )


def _torch_build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def is_built_for(architecture: str, built: Sequence[str]) -> bool:
    """Whether torch, built for these architectures, has kernels for this one.

    Code for sm_XY runs on sm_XZ with Z ≥ Y, and compute_XY on everything newer (CUDA C++
    Programming Guide, "Application Compatibility"); code for an AMD GPU runs on that one only.
    """
    if architecture in built:
        return True
    wanted = re.fullmatch(r"sm_(\d+)(\d)", architecture)
    for name in built if wanted else ():
        found = re.match(r"(sm|compute)_(\d+)(\d)", name)
        if wanted is None or found is None:
            continue
        own, have = (int(wanted[1]), int(wanted[2])), (int(found[2]), int(found[3]))
        if have <= own and (found[1] == "compute" or have[0] == own[0]):
            return True
    return False


def describe_library() -> LibraryReport:
    """Describe the native CPU kernels. Raises KernelsError for a level that is not available."""
    chosen = bool(os.environ.get(bindings.VARIABLE))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = bindings.library()
    if loaded is None:
        problem = " ".join(str(warning.message) for warning in caught) or None
        return LibraryReport("none", chosen_by_user=chosen, problem=problem)
    levels = [name for name in bindings.LEVELS[1:] if bindings.has_level(loaded, name)]
    return LibraryReport(bindings.kernels.level, ("none", *levels), chosen)


def report_rates(device: torch.device) -> RatesReport:
    """Measure the rates of this machine now, whatever is in the cache."""
    found = measure.measure_peaks(device)
    return RatesReport(
        read=found["bandwidth"],
        copy=measure.copy_rate(device),
        launch_s=found["launch_s"],
        peaks=found["peaks"],
    )
