"""The findings of an examination, as types, and as JSON for programs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

REPORT_IT = "report it with this output"
"""The remedy for faults of getp."""

State = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One line of the result."""

    name: str
    state: State
    finding: str
    remedy: str | None = None  # what the user can do; None if there is no problem
    figures: Mapping[str, Any] = field(default_factory=dict)  # JSON values


@dataclass(frozen=True)
class KernelCheck:
    """One kernel at the sizes of one model, compared with the reference and timed."""

    backend: str  # an instruction set, "torch" or "triton"
    model: str  # whose widths were used
    op: str
    label: str  # what distinguishes the cases of an operation
    problem: str | None  # None: it agrees with the reference
    seconds: float | None = None  # of one call
    bytes: int = 0  # that a call must read and write at least
    flops: int = 0
    share: float | None = None  # of the measured limit of this machine: above 1 from its caches

    @property
    def state(self) -> State:
        """Whether the kernel passed."""
        return "ok" if self.problem is None else "failed"


@dataclass(frozen=True)
class Diagnosis:
    """The result of an examination."""

    model: str  # whose widths the kernels were checked at
    version: str  # of getp
    seconds: float
    checks: tuple[Check, ...]
    kernels: tuple[KernelCheck, ...]

    @property
    def failed(self) -> list[Check]:
        """The checks that found a problem; those of kernels sum up `kernels`."""
        return [check for check in self.checks if check.state == "failed"]

    @property
    def is_ok(self) -> bool:
        """Whether no check found a problem."""
        return not self.failed

    def as_json(self) -> dict[str, Any]:
        """Return the diagnosis for `--json`; sizes in bytes, times in seconds."""
        return {
            "ok": self.is_ok,
            "getp": self.version,
            "model": self.model,
            "seconds": self.seconds,
            "checks": [asdict(check) for check in self.checks],
            "kernels": [{**asdict(kernel), "state": kernel.state} for kernel in self.kernels],
        }
