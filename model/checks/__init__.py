"""Checks of kernels: small inputs for every operation that a model uses, compared with torch.

`cases` yields inputs at the model's true widths and `problem` compares a backend's results with
those of the plain-torch `Backend` on the same device. `verify.py` uses both to decide which kernels
an engine uses. Nothing here loads a checkpoint: weights are random.
"""

from model.checks.case import Case, ReferenceFailedError, problem, reference_of
from model.checks.cases import cases
from model.checks.inputs import FULL, SMALL, Size
from model.ops.backend import OPERATIONS

__all__ = [
    "FULL",
    "OPERATIONS",
    "SMALL",
    "Case",
    "ReferenceFailedError",
    "Size",
    "cases",
    "problem",
    "reference_of",
]
