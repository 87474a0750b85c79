"""Case: one operation on fixed inputs, and its comparison with the reference."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from model.ops.backend import Backend
from model.ops.kv_values import FP8

Tensors = tuple[torch.Tensor, ...]
Capture = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Captures a call, on a GPU as a graph, and returns its replay, which returns the same tensors."""

# Largest error relative to the largest expected value. Products of 16-bit inputs are compared with
# a float32 reference on the same inputs, so only roundings within an operation count.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_TOLERANCE |= dict.fromkeys(FP8, 2**-4 + 2e-2)  # half of its step, and the error before rounding


class ReferenceFailedError(Exception):
    """Plain torch fails on this device, so kernels cannot be compared with it."""


@dataclass(frozen=True)
class Case:
    """One operation on inputs that are the same for every backend.

    `prepare` copies the inputs to a backend's dtype and storage, and returns the call. The call can
    be repeated, timed and captured; its results are new in each call, or overwritten with the same
    values. `bytes` are those that must be read and written once, `flops` those of products.
    """

    op: str  # name of a method of Backend
    label: str  # what is special about these inputs
    prepare: Callable[[Backend], Callable[[], Tensors]]
    bytes: int
    flops: int
    is_timed: bool = False  # large enough to show which kernel is faster
    tolerance: float = 0.0  # if larger than that of the dtype: kernels may round inputs

    def run(self, backend: Backend) -> Tensors:
        """Return the results on a backend."""
        return self.prepare(backend)()

    def __str__(self) -> str:
        return f"{self.op}: {self.label}"


def reference_of(backend: Backend) -> Backend:
    """Return the backend to compare with: plain torch in float32 on the same device."""
    return Backend(backend.device, torch.float32)


def problem(
    case: Case, backend: Backend, reference: Backend, capture: Capture | None = None
) -> str | None:
    """Return what is wrong with a backend's results of a case; None if nothing is.

    reference: a plain-torch Backend, see `reference_of`. capture: also capture the call and compare
    the results of its replay. New memory is filled with NaN, so that a value that a kernel does not
    write is found. An exception is a problem, too. Raises ReferenceFailedError, and
    torch.OutOfMemoryError, which says nothing about a kernel.
    """
    expected = _expected(case, reference)
    try:
        call = case.prepare(backend)
        with new_memory_is_nan():
            found = call()
        wrong = compare(found, expected, backend.dtype, case.tolerance)
        if wrong is None and capture is not None:
            wrong = compare(capture(call)(), expected, backend.dtype, case.tolerance)
            wrong = wrong and f"replayed: {wrong}"
        return wrong
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error_text(error)


def _expected(case: Case, reference: Backend) -> Tensors:
    """Return the results of the reference. Raises ReferenceFailedError if they cannot be right."""
    try:
        expected = case.run(reference)
        is_finite = all(
            not one.is_floating_point() or bool(one.isfinite().all()) for one in expected
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ReferenceFailedError(f"{case}: plain torch fails: {error_text(error)}") from error
    if not is_finite:
        raise ReferenceFailedError(f"{case}: plain torch gives values that are not finite")
    return expected


def error_text(error: BaseException) -> str:
    """Return the type of an error and the start of its message, in one line."""
    # torch raises again, without the cause, when a failed capture ends.
    error = error.__context__ or error
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".removesuffix(": ")


def compare(
    found: Tensors, expected: Tensors, dtype: torch.dtype, tolerance: float = 0.0
) -> str | None:
    """Return the first difference between results and what was expected.

    Whole numbers must be equal; floating-point numbers may differ by the largest of the given
    tolerance and those of the dtype and their own one, relative to the largest expected value of
    their tensor. NaN is always wrong.
    """
    for number, (one, want) in enumerate(zip(found, expected, strict=True)):
        name = f"result {number}"
        if one.shape != want.shape:
            return f"{name} has shape {list(one.shape)}, expected {list(want.shape)}"
        if not want.is_floating_point():
            different = int((one != want).sum())
            if different:
                return f"{name}: {different} of {want.numel()} values differ"
            continue
        want = want.float()
        error = (one.float() - want).abs().max() if want.numel() else want.new_zeros(())
        if not error.isfinite():
            return f"{name} has values that are not finite"
        largest = float(want.abs().max()) if want.numel() else 1.0
        share = float(error) / (largest or 1.0)
        if share > max(_TOLERANCE[dtype], _TOLERANCE.get(one.dtype, 0.0), tolerance):
            return f"{name} differs by {share:.1e} of its largest value"
    return None


@contextlib.contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """Fill new memory with NaN; it could hold the correct result of an earlier call."""
    before, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # The function that `torch.use_deterministic_algorithms` calls, which first imports torch's
    # compiler: that takes seconds.
    set_deterministic = torch._C._set_deterministic_algorithms
    set_deterministic(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that are not deterministic
            yield
    finally:
        set_deterministic(before, warn_only=warns)
