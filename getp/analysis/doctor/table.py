"""A diagnosis as tables for people."""

from rich.table import Table
from rich.text import Text

from getp import tables
from getp.analysis.doctor.findings import Diagnosis, KernelCheck
from getp.units import counted, duration

_STYLES = {"ok": "green", "failed": "bold red", "skipped": "dim"}


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print the checks, the kernels and the conclusion on standard output."""
    console = tables.console()
    tables.show(console, _checks_table(diagnosis))
    if diagnosis.kernels:
        console.print(
            "\nKernels on their largest input: share of the bandwidth or FLOP/s measured above. "
            "More than 100%: the data was in caches.",
            style="dim",
            soft_wrap=True,
        )
        tables.show(console, _kernels_table(diagnosis.kernels))
    found = len(diagnosis.failed)
    conclusion = f"{counted(found, 'problem')} found" if found else "No problems found"
    console.print(f"\n{conclusion} ({duration(diagnosis.seconds)}).", style="bold", soft_wrap=True)


def _checks_table(diagnosis: Diagnosis) -> Table:
    # Text, not markup: a finding may contain square brackets.
    table = tables.table(["check", "state", "finding"], [])
    for check in diagnosis.checks:
        state = Text(check.state, style=_STYLES[check.state])
        table.add_row(Text(check.name), state, Text(check.finding))
        if check.remedy is not None:
            table.add_row("", "", Text(f"What to do: {check.remedy}.", style="bold"))
    return table


def _kernels_table(kernels: tuple[KernelCheck, ...]) -> Table:
    """Return a row for each operation with a column for each backend."""
    backends = list(dict.fromkeys(kernel.backend for kernel in kernels))
    table = tables.table(["operation"], backends)
    for op in dict.fromkeys(kernel.op for kernel in kernels):
        cells = ([k for k in kernels if (k.op, k.backend) == (op, name)] for name in backends)
        table.add_row(op, *(_cell(cases) for cases in cells))
    return table


def _cell(kernels: list[KernelCheck]) -> Text:
    """Return the state of an operation on a backend: failed, or its share of the limit."""
    if not kernels:
        return Text("-")
    if any(kernel.state == "failed" for kernel in kernels):
        return Text("failed", style=_STYLES["failed"])
    timed = [(k.share * k.seconds, k.share) for k in kernels if k.share and k.seconds]
    share = max(timed)[1] if timed else 0.0
    return Text("ok" if not timed else ">100%" if share > 1 else f"{share:.1%}")
