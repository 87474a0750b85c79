"""What a child process reports, one JSON object per line, and what it is asked to do."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

PREFIX = "getp-doctor: "
"""Prefix of the reports in a child's output; other lines are messages of libraries."""

INSTALL = "install the build of torch for this machine, and a driver that is new enough for it"
REFERENCE = "plain torch"
"""The name of failures of the operations that kernels are compared with."""


@dataclass(frozen=True)
class Request:
    """What a child is to examine."""

    device: str  # auto, cpu, cuda or cuda:N
    models: tuple[str, ...]  # whose widths are used: directories, or names of well-known models
    level: str | None = None  # instruction set of CPU kernels; None: as in a job
    machine: bool = True  # describe the device, measure its rates, and check sampling, too
    first: int = 0  # the first task to run: earlier children have run the others

    @classmethod
    def read(cls, text: str) -> "Request":
        """Return the request that `write` has written."""
        fields = json.loads(text)
        return cls(**{**fields, "models": tuple(fields["models"])})

    def write(self) -> str:
        """Return the request as JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Started:
    """A task is beginning; if nothing follows, it has ended the process."""

    number: int
    name: str  # of a kernel's task: OPERATION: LABEL
    model: str = ""  # whose widths the kernel has; empty: the task is not a kernel's


@dataclass(frozen=True)
class Failed:
    """A task raised an exception, crashed or hung."""

    name: str
    cause: str
    model: str = ""  # name and model as in Started
    remedy: str = ""  # what to do, if the cause says that


@dataclass(frozen=True)
class Ended:
    """All tasks are done."""


@dataclass(frozen=True)
class DeviceReport:
    """The device, as torch and the system describe it."""

    type: str  # cpu or cuda
    name: str
    count: int  # GPUs that torch finds; on a CPU its threads
    memory: int  # bytes
    free: int  # bytes that can still be allocated
    torch_build: str  # what torch was built for: CPU, CUDA 13.0 or ROCm 7.0
    driver: str | None = None
    architecture: str | None = None
    processors: int = 0
    is_built_for: bool = True  # whether torch has kernels for this architecture
    has_triton: bool = True
    notices: tuple[str, ...] = ()  # warnings of torch while it looked for GPUs


@dataclass(frozen=True)
class LibraryReport:
    """The native CPU kernels."""

    level: str  # in use; none: torch computes
    levels: tuple[str, ...] = ("none",)  # that this processor can run
    chosen_by_user: bool = False
    problem: str | None = None  # why there are none


@dataclass(frozen=True)
class RatesReport:
    """Measured rates: bytes and FLOPs per second, seconds per launch."""

    read: float
    copy: float  # read plus written
    launch_s: float
    peaks: dict[str, float]  # of matrix products, by dtype


@dataclass(frozen=True)
class KernelReport:
    """A kernel compared with the reference, and timed if it passed."""

    backend: str
    model: str
    op: str
    label: str
    dtype: str
    problem: str | None
    seconds: float | None
    bytes: int
    flops: int


@dataclass(frozen=True)
class ScoreReport:
    """The embedded model's answers on a backend, and whether its decode steps are replayed."""

    backend: str
    right: int
    questions: int
    seconds: float
    captured: bool
    can_capture: bool  # whether the backend has a way to replay steps
    notices: tuple[str, ...] = field(default=())  # of the engine: why steps are not replayed


Report = (
    Started | Failed | Ended | DeviceReport | LibraryReport | RatesReport | KernelReport
    | ScoreReport
)  # fmt: skip
_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        Started, Failed, Ended, DeviceReport, LibraryReport, RatesReport, KernelReport,
        ScoreReport,
    )
}  # fmt: skip


def write(report: Report) -> str:
    """Return a report as a line."""
    return PREFIX + json.dumps([type(report).__name__, asdict(report)])


def read(line: str) -> Report | None:
    """Return the report of a line; None if the line is something else."""
    if not line.startswith(PREFIX):
        return None
    name, fields = json.loads(line.removeprefix(PREFIX))
    report: Report = _KINDS[name](
        **{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    )
    return report
