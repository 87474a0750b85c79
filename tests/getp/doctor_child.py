"""A child process of the examination with a fault in it, for test_doctor: one series of tasks.

Arguments: the fault, then the request. The rates are not measured, and there is only one backend.
"""

import ctypes
import os
import sys
from typing import Any

import torch

from getp.analysis.doctor import child, device
from getp.analysis.doctor.reports import LibraryReport, RatesReport
from model.ops.cpu import bindings, native
from model.ops.cpu.backend import CpuBackend

_describe_library = device.describe_library


def _one_level() -> LibraryReport:
    found = _describe_library()
    return LibraryReport(found.level, (found.level,), found.chosen_by_user, found.problem)


def _wrong_linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    result = _linear(x, weight, bias)
    result[:, -1] += 1  # one wrong column, as of a wrong tile
    return result


def _illegal_instruction(*arguments: Any) -> None:
    """Execute what a processor without an instruction set answers with SIGILL."""
    os.kill(os.getpid(), 4)


def _raise(*arguments: Any) -> None:
    raise ZeroDivisionError("of the test")


device.describe_library = _one_level
device.report_rates = lambda device: RatesReport(1e10, 1e10, 1e-6, {"float32": 1e11})
_linear, fault = native.linear, sys.argv[1]
if fault == "wrong linear":
    native.linear = _wrong_linear
elif fault == "crash":
    CpuBackend.embed = _illegal_instruction  # type: ignore[method-assign, assignment]
elif fault == "raise":
    CpuBackend.embed = _raise  # type: ignore[method-assign, assignment]
elif fault == "missing library":
    bindings.EXTENSION_SUFFIXES[:] = [".missing"]
elif fault == "damaged library":
    bindings.load = lambda file: ctypes.CDLL(__file__)
else:
    assert fault == "none", fault
child.main()
