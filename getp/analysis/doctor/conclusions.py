"""What the reports of child processes mean: checks, and shares of the measured limits."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from getp.analysis.doctor.findings import REPORT_IT, Check, KernelCheck
from getp.analysis.doctor.reports import (
    INSTALL,
    REFERENCE,
    DeviceReport,
    Failed,
    KernelReport,
    LibraryReport,
    RatesReport,
    Report,
    ScoreReport,
)
from getp.units import counted, duration, memory, percent, quantity
from model.cost.devices import Device, device_of_driver

LEAST_SCORE = 0.95
"""Minimum share of correct answers: rounding can change a token if two are nearly tied."""
_LEAST_BANDWIDTH, _LEAST_PRODUCT = 0.6, 0.35
"""Shares of the data sheet. A GPU on its own reaches 75% or more of its bandwidth and half or more
of its product rate; far less means that it is throttled, shared or has a low power limit."""
_LEAST_MEMORY = 1 << 30
_NODES = ("/dev/nvidia0", "/dev/kfd")  # of the drivers of NVIDIA and AMD, if there is a GPU


@dataclass
class Series:
    """The reports of the processes that examined one backend."""

    backend: str  # as in KernelCheck; replaced as soon as a report names it
    device: DeviceReport | None = None
    library: LibraryReport | None = None
    rates: RatesReport | None = None
    score: ScoreReport | None = None
    kernels: list[KernelReport] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)

    def add(self, report: Report) -> None:
        """Take a report."""
        match report:
            case DeviceReport():
                self.device = report
                if report.type == "cuda":
                    self.backend = "triton" if report.has_triton else "torch"
            case LibraryReport():
                self.library = report
                self.backend = "torch" if report.level == "none" else report.level
            case RatesReport():
                self.rates = report
            case ScoreReport():
                self.score = report
            case KernelReport():
                self.kernels.append(report)
            case Failed():
                self.failed.append(report)


def checks_of(series: Series) -> Iterator[Check]:
    """Yield what a series found, in the order in which it is shown."""
    if series.device is not None:
        yield device_check(series.device)
        yield memory_check(series.device)
    if series.library is not None:
        yield library_check(series.library)
    if series.rates is not None and series.device is not None:
        yield rates_check(series.rates, series.device)
    without_reference = [failure for failure in series.failed if failure.name == REFERENCE]
    if without_reference:
        cases = counted(len(without_reference), "kernel check")
        finding = f"{without_reference[0].cause}; {cases} could not be made"
        yield Check(f"{REFERENCE}, {series.backend}", "failed", finding, INSTALL)
    for failure in series.failed:
        if failure.name == REFERENCE:
            continue
        if failure.remedy:
            yield Check(failure.name, "failed", failure.cause, failure.remedy)
        elif not failure.model:
            if failure.name == "device":
                yield Check("device", "failed", failure.cause, INSTALL)
            else:
                name = f"{failure.name}, {series.backend}"
                yield Check(name, "failed", failure.cause, REPORT_IT)
    kernels = kernels_of(series, series.rates)
    for backend in dict.fromkeys(kernel.backend for kernel in kernels):
        yield kernels_check(backend, [one for one in kernels if one.backend == backend])
    if series.score is not None:
        yield replay_check(series.score)
        yield score_check(series.score)


def kernels_of(series: Series, rates: RatesReport | None) -> list[KernelCheck]:
    """Return the checks of the series' kernels, with those that ended a process.

    rates: measured on the device of the series; None: shares are not known.
    """
    found = [_kernel(report, rates) for report in series.kernels]
    for failure in series.failed:
        if failure.model and not failure.remedy:
            op, label = failure.name.split(": ", 1)
            found.append(KernelCheck(series.backend, failure.model, op, label, failure.cause))
    return found


def _kernel(report: KernelReport, rates: RatesReport | None) -> KernelCheck:
    share = None
    if rates is not None and report.seconds:
        peak = rates.peaks.get(report.dtype, rates.peaks["float32"])
        limit_s = max(report.bytes / max(rates.read, rates.copy), report.flops / peak)
        share = limit_s / report.seconds
    fields = {key: value for key, value in asdict(report).items() if key != "dtype"}
    return KernelCheck(**fields, share=share)


def device_check(device: DeviceReport) -> Check:
    """Check that torch finds the GPU, and supports it."""
    figures = asdict(device)
    if device.type == "cpu":
        finding = f"{device.name}, {counted(device.count, 'thread')}, {device.architecture}"
        node = next((node for node in _NODES if Path(node).exists()), None)
        if node is None:
            return Check("CPU", "ok", finding, figures=figures)
        cause = f"{node} exists, but torch (built for {device.torch_build}) finds no GPU"
        return Check("GPU", "failed", ": ".join([cause, *device.notices]), INSTALL, figures)
    finding = (
        f"{device.name}, {device.architecture}, {device.processors} processors, "
        f"driver {device.driver}, {device.torch_build}; 1 of {counted(device.count, 'GPU')}"
    )
    if not device.is_built_for:
        return Check(
            "GPU", "failed", f"torch has no kernels for {device.architecture}: {finding}",
            "install a build of torch for this GPU", figures,
        )  # fmt: skip
    if not device.has_triton:
        return Check(
            "GPU", "failed", f"Triton is not installed, so plain torch is used: {finding}",
            "install the build of torch for this GPU, which includes Triton", figures,
        )  # fmt: skip
    return Check("GPU", "ok", finding, figures=figures)


def memory_check(device: DeviceReport) -> Check:
    """Check that there is free memory."""
    name = "memory of the GPU" if device.type == "cuda" else "memory"
    finding = f"{memory(device.free)} of {memory(device.memory)} free"
    figures = {"free": device.free, "total": device.memory}
    if device.free < _LEAST_MEMORY:
        return Check(name, "failed", finding, "end programs that use it", figures)
    return Check(name, "ok", finding, figures=figures)


def library_check(library: LibraryReport) -> Check:
    """Check that the native CPU kernels are built and used."""
    name, figures = "native kernels", asdict(library)
    if library.problem is not None:
        remedy = "run `pip install -e .` where there is a C++ compiler"
        return Check(name, "failed", library.problem, remedy, figures)
    others = ", ".join(level for level in library.levels if level not in (library.level, "none"))
    finding = f"{library.level}" + (f"; this processor also has {others}" if others else "")
    if library.chosen_by_user:
        finding = f"{library.level}, as GETP_CPU_KERNELS says"
    return Check(name, "ok", finding, figures=figures)


def rates_check(rates: RatesReport, device: DeviceReport) -> Check:
    """Compare the measured rates with the data sheet, where there is one."""
    sheet = device_of_driver(device.name)
    name = "speed of the GPU" if device.type == "cuda" else "speed of the CPU"
    peaks = dict(sheet.peaks) if sheet else {}
    bandwidth = sheet.bandwidth if sheet else None
    parts = [f"read {_rate(rates.read, 'B/s', bandwidth)}"]
    parts.append(f"copy {_rate(rates.copy, 'B/s', bandwidth)}")
    parts += [
        f"{dtype} {_rate(peak, 'FLOP/s', peaks.get(dtype))}" for dtype, peak in rates.peaks.items()
    ]
    parts.append(f"launch {duration(rates.launch_s)}")
    finding = ", ".join(parts)
    figures = {**asdict(rates), "data_sheet": None if sheet is None else _figures(sheet)}
    if sheet is None:
        return Check(name, "ok", finding, figures=figures)
    slow = []
    if max(rates.read, rates.copy) < _LEAST_BANDWIDTH * sheet.bandwidth:
        slow.append("memory")
    if (
        max(rate / peaks[kind] for kind, rate in rates.peaks.items() if kind in peaks)
        < _LEAST_PRODUCT
    ):
        slow.append("products")
    if slow:
        return Check(
            name, "failed", f"{' and '.join(slow)} far below the data sheet: {finding}",
            "check the GPU for other programs, its power limit and its temperature", figures,
        )  # fmt: skip
    return Check(name, "ok", f"{finding} (% of the data sheet: {sheet.name})", figures=figures)


def _figures(sheet: Device) -> dict[str, object]:
    """Return the limits of a data sheet as JSON values."""
    return {
        "name": sheet.name,
        "source": sheet.source,
        "bandwidth": sheet.bandwidth,
        "peaks": dict(sheet.peaks),
    }


def _rate(value: float, unit: str, limit: float | None) -> str:
    share = "" if limit is None else f" ({value / limit:.0%})"
    return f"{quantity(value, unit)}{share}"


def kernels_check(backend: str, kernels: list[KernelCheck]) -> Check:
    """Sum up the kernels of a backend."""
    failed = [kernel for kernel in kernels if kernel.problem is not None]
    passed = len(kernels) - len(failed)
    figures = {"passed": passed, "checked": len(kernels)}
    name = f"kernels, {backend}"
    if not failed:
        return Check(name, "ok", f"{passed} of {len(kernels)} correct", figures=figures)
    texts = [f"{one.op} ({one.label}; {one.model}): {one.problem}" for one in failed[:3]]
    more = [f"{len(failed) - 3} more"] if len(failed) > 3 else []
    finding = f"{len(failed)} of {len(kernels)} failed: {'; '.join([*texts, *more])}"
    remedy = REPORT_IT
    if backend == "triton":
        remedy += "; until then a job uses other kernels or plain torch instead"
    elif backend != "torch":
        remedy += "; until then set GETP_CPU_KERNELS to an instruction set that passes"
    return Check(name, "failed", finding, remedy, figures)


def replay_check(score: ScoreReport) -> Check:
    """Check that decode steps are replayed: GPU graphs, or recorded calls on a CPU."""
    name = f"graphs, {score.backend}"
    figures = {"captured": score.captured, "notices": list(score.notices)}
    if score.captured:
        finding = "; ".join(["decode steps are replayed", *score.notices])
        return Check(name, "ok", finding, figures=figures)
    if not score.can_capture:
        return Check(name, "skipped", "not recorded: torch's operations on a CPU", None, figures)
    cause = "; ".join(score.notices) or "the native kernels do not compute every operation"
    return Check(name, "failed", f"decode steps are not replayed: {cause}", REPORT_IT, figures)


def score_check(score: ScoreReport) -> Check:
    """Check the answers of the embedded model."""
    name = f"answers, {score.backend}"
    finding = f"{score.right} of {score.questions} correct in {duration(score.seconds)}"
    figures = {"right": score.right, "questions": score.questions, "seconds": score.seconds}
    if score.right < LEAST_SCORE * score.questions:
        finding += f"; at least {percent(LEAST_SCORE)} must be"
        return Check(name, "failed", finding, REPORT_IT, figures)
    return Check(name, "ok", finding, figures=figures)
