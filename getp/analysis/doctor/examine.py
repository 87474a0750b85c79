"""The examination: host, device, rates, kernels and answers → Diagnosis."""

import time
from collections.abc import Callable, Iterator
from functools import partial

from getp import __version__
from getp.analysis.doctor import host
from getp.analysis.doctor.conclusions import Series, checks_of, kernels_of
from getp.analysis.doctor.findings import REPORT_IT, Check, Diagnosis, KernelCheck
from getp.analysis.doctor.processes import run_tasks
from getp.analysis.doctor.reports import Request, Started

TYPICAL_MODEL = "qwen3-0.6b"
"""The well-known model whose widths are checked besides those of the embedded model."""

Progress = Callable[[str], None]


def examine(model: str, models: tuple[str, ...], device: str, progress: Progress) -> Diagnosis:
    """Examine this machine; an error in one check does not end the others.

    model: the name of the checkpoint. models: whose widths the kernels are checked at, directories
    or names of well-known models. device: auto (everything there is), cpu, cuda or cuda:N.
    progress: called with what is running now.
    """
    started = time.perf_counter()
    progress("versions and disks")
    checks = [_guarded("versions", host.version_check)]
    kernels: list[KernelCheck] = []
    rates, on_gpu = None, False
    for series in _all_series(models, device, progress):
        if series.device is not None:  # measured once for all instruction sets of a CPU
            rates = series.rates
        on_gpu |= series.device is not None and series.device.type == "cuda"
        checks += checks_of(series)
        kernels += kernels_of(series, rates)
    checks += [
        _guarded(folder.use, partial(host.folder_check, folder))
        for folder in host.FOLDERS
        if on_gpu or not folder.on_gpu
    ]
    checks.append(_guarded("Ray", host.ray_check))
    seconds = time.perf_counter() - started
    return Diagnosis(model, __version__, seconds, tuple(checks), tuple(kernels))


def _all_series(models: tuple[str, ...], device: str, progress: Progress) -> Iterator[Series]:
    """Examine each backend: that of the GPU, then the CPU's instruction sets, the usual first."""
    on_gpu = device.startswith("cuda")
    first = _series(Request(device, models), "triton" if on_gpu else "native", progress)
    yield first
    if on_gpu:
        return
    if first.device is not None and first.device.type == "cuda":
        first = _series(Request("cpu", models), "native", progress)
        yield first
    library = first.library
    for level in reversed(library.levels if library else ()):
        if library is not None and level != library.level:
            request = Request("cpu", models, level=level, machine=False)
            yield _series(request, "torch" if level == "none" else level, progress)


def _series(request: Request, backend: str, progress: Progress) -> Series:
    """Run the tasks of a request."""
    series = Series(backend)
    progress(f"{backend}: starting a process")
    for report in run_tasks(request):
        if isinstance(report, Started):
            progress(": ".join(filter(None, [series.backend, report.model, report.name])))
        series.add(report)
    return series


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """Return what the check finds; if it raises, that is what it found."""
    try:
        return check()
    except Exception as error:
        return Check(name, "failed", f"{type(error).__name__}: {error}", REPORT_IT)
