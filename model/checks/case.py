"""Case: one operation on fixed inputs, and its comparison with the reference."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from model.ops.backend import Backend

Tensors = tuple[torch.Tensor, ...]

# Largest error relative to the largest expected value. Products of 16-bit inputs are compared with
# a float32 reference on the same inputs, so only roundings within an operation count.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


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
    is_timed: bool = False  # large enough that its time says which kernel is faster

    def run(self, backend: Backend) -> Tensors:
        """Return the results on a backend."""
        return self.prepare(backend)()

    def __str__(self) -> str:
        return f"{self.op}: {self.label}"


def reference_of(backend: Backend) -> Backend:
    """Return the backend to compare with: plain torch in float32 on the same device."""
    return Backend(backend.device, torch.float32)


def problem(case: Case, backend: Backend, reference: Backend) -> str | None:
    """Return what is wrong with a backend's results of a case; None if nothing is.

    reference: a plain-torch Backend, see `reference_of`. New memory is filled with NaN, so that a
    value that a kernel does not write is found. An exception is a problem, too, except that
    torch.OutOfMemoryError is raised: it says nothing about a kernel.
    """
    expected = case.run(reference)
    try:
        call = case.prepare(backend)
        with new_memory_is_nan():
            found = call()
        return compare(found, expected, backend.dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error_text(error)


def error_text(error: BaseException) -> str:
    """Return the type of an error and the start of its message, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".removesuffix(": ")


def compare(found: Tensors, expected: Tensors, dtype: torch.dtype) -> str | None:
    """Return the first difference between results and what was expected.

    Whole numbers must be equal; floating-point numbers may differ by the tolerance of the dtype,
    relative to the largest expected value of their tensor. NaN is always wrong.
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
        if not want.isfinite().all():
            raise ValueError(f"{name}: the reference itself has values that are not finite")
        error = (one.float() - want).abs().max() if want.numel() else want.new_zeros(())
        if not error.isfinite():
            return f"{name} has values that are not finite"
        largest = float(want.abs().max()) if want.numel() else 1.0
        share = float(error) / (largest or 1.0)
        if share > _TOLERANCE[dtype]:
            return f"{name} differs by {share:.1e} of its largest value"
    return None


@contextlib.contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """Fill new memory with NaN; it could hold the correct result of an earlier call."""
    before, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that are not deterministic
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
