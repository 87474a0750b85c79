"""Tables on standard output that never cut off a value, however narrow the terminal is.

If a table is too wide, rich shrinks columns below their longest word and truncates the last ones
at the edge. The widths are therefore computed here, and rich only prints the table.
"""

import os
from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

_UNLIMITED = 1 << 16


def console() -> Console:
    """Return a console on standard output, of unlimited width if that is not a terminal.

    COLUMNS in the environment sets another width.
    """
    result = Console(highlight=False)
    if not result.is_terminal and "COLUMNS" not in os.environ:
        result.width = _UNLIMITED
    return result


def hint(text: str) -> None:
    """Print a dim line on standard output, which says how to see more."""
    console().print(text, style="dim", soft_wrap=True, markup=False)


def table(texts: Iterable[str], numbers: Iterable[str]) -> Table:
    """Return a table for `show` with left-aligned text columns, then right-aligned numbers."""
    result = Table(box=None, padding=(0, 0, 0, 1), header_style="bold")
    for name in texts:
        result.add_column(name)
    for name in numbers:
        result.add_column(name, justify="right")
    return result


def show(console: Console, table: Table) -> None:
    """Print a table. If it is too wide, wrap texts and headers between words, widest column first.

    If that is not enough, the table exceeds the width: a truncated number would be misread.
    """
    widths, min_widths = [], []
    for column in table.columns:
        header, cells = str(column.header), [str(cell) for cell in column.cells]
        numeric = column.justify == "right"
        unbroken = [*header.split(), *(cells if numeric else " ".join(cells).split())]
        widths.append(max(map(cell_len, [header, *cells])))
        min_widths.append(max(map(cell_len, unbroken)))
    excess = sum(widths) + len(widths) - console.width
    while excess > 0 and widths != min_widths:
        widest = max((width, at) for at, width in enumerate(widths) if width > min_widths[at])[1]
        widths[widest] -= 1
        excess -= 1
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    if excess > 0:
        console = Console(highlight=False, width=console.width + excess)
    console.print(table)
