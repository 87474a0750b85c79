"""Tables on standard output, of which nothing is cut off, however narrow it is."""

import os
from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

_ANY_WIDTH = 1 << 16


def console() -> Console:
    """Return standard output; where it is no terminal, tables are as wide as they need.

    COLUMNS in the environment sets another width.
    """
    found = Console(highlight=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = _ANY_WIDTH
    return found


def table(texts: Iterable[str], numbers: Iterable[str]) -> Table:
    """Return a table with columns for texts, then for numbers, for `show` to print."""
    found = Table(box=None, padding=(0, 0, 0, 1), header_style="bold")
    for name in texts:
        found.add_column(name)
    for name in numbers:
        found.add_column(name, justify="right")
    return found


def show(console: Console, table: Table) -> None:
    """Print a table. Where it is too wide, texts and headers wrap between words, the widest first.

    What does not fit even so goes over the edge: half a number would be another number.
    """
    widths, least = [], []
    for column in table.columns:
        header, cells = str(column.header), [str(cell) for cell in column.cells]
        numbers = column.justify == "right"
        unbroken = [*header.split(), *(cells if numbers else " ".join(cells).split())]
        widths.append(max(map(cell_len, [header, *cells])))
        least.append(max(map(cell_len, unbroken)))
    excess = sum(widths) + len(widths) - console.width
    while excess > 0 and widths != least:
        widest = max((width, at) for at, width in enumerate(widths) if width > least[at])[1]
        widths[widest] -= 1
        excess -= 1
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    if excess > 0:
        console = Console(highlight=False, width=console.width + excess)
    console.print(table)
