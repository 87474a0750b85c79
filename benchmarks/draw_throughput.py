"""Draw the tables of RESULTS.md as throughput.svg: `python benchmarks/draw_throughput.py`.

The figure shows getp's throughput relative to other engines. It has one panel per machine and one
bar per table row, as long as the median ratio. Needs matplotlib (`pip install 'getp[plot]'`).
"""

import re
import statistics
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).with_name("RESULTS.md")
FIGURE = Path(__file__).with_name("throughput.svg")
_HEADER = "| checkpoint | load | getp / peer, each pair | median ratio |"
_PAIR = re.compile(r"([\d.]+) / ([\d.]+)")
_PEER = re.compile(r"\((\w[\w.]*)[^)]*\)")
# Colours of the peers in the order of their first bar; distinguishable with colour blindness.
_COLOURS = ("#0072B2", "#E69F00", "#009E73")


@dataclass(frozen=True)
class Comparison:
    """One table row: getp and a peer on one load. `pairs` holds output tokens/s of (getp, peer)."""

    machine: str
    checkpoint: str
    load: str
    peer: str
    pairs: tuple[tuple[float, float], ...]
    median_ratio: float

    @property
    def medians(self) -> tuple[float, float]:
        """Median output tokens per second of (getp, peer)."""
        ours, theirs = zip(*self.pairs, strict=True)
        return statistics.median(ours), statistics.median(theirs)


def read_comparisons(text: str) -> list[Comparison]:
    """Return the rows of all comparison tables in the text of RESULTS.md.

    The heading above a table names the machine. An empty checkpoint or load repeats the one above.
    """
    found: list[Comparison] = []
    machine, in_table = "", False
    for line in text.splitlines():
        if line.startswith("#"):
            machine = line.strip("# ")
        if line == _HEADER:
            in_table, checkpoint, load = True, "", ""
        elif not line.startswith("|"):
            in_table = False
        elif in_table and not line.startswith("|---"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            checkpoint, load = cells[0] or checkpoint, cells[1] or load
            pairs = tuple((float(a), float(b)) for a, b in _PAIR.findall(cells[2]))
            peer = _PEER.findall(cells[2])[0]
            found.append(Comparison(machine, checkpoint, load, peer, pairs, float(cells[3])))
    return found


def draw(comparisons: list[Comparison]) -> "Figure":
    """Return the figure: a panel per machine, a bar per comparison, coloured by peer."""
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and the same tables give the same bytes.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "getp", "font.size": 8})
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    panels = [list(group) for _, group in groupby(comparisons, lambda c: c.machine)]
    colours = dict(zip(dict.fromkeys(c.peer for c in comparisons), _COLOURS, strict=False))
    figure, axes = plt.subplots(
        len(panels),
        figsize=(8.5, 1.5 + 0.18 * len(comparisons)),
        height_ratios=[len(panel) + 1 for panel in panels],
        sharex=True,
        layout="constrained",
    )
    for axis, panel in zip(axes, panels, strict=True):
        bars = axis.barh(
            range(len(panel)),
            [c.median_ratio for c in panel],
            color=[colours[c.peer] for c in panel],
        )
        axis.bar_label(bars, [_label(c) for c in panel], padding=4, fontsize=7)
        axis.set_yticks(range(len(panel)), [f"{c.checkpoint}, {c.load}" for c in panel], fontsize=7)
        axis.set_title(panel[0].machine, loc="left", fontsize=8, fontweight="bold")
        axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlim(0, 1.4 * max(c.median_ratio for c in comparisons))
    axes[-1].set_xlabel(
        "output tokens/s of getp relative to the peer, median of pairs (dashed line: equal)"
    )
    handles = [Patch(color=colour, label=peer) for peer, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    return figure


def _label(comparison: Comparison) -> str:
    ours, theirs = (f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" for rate in comparison.medians)
    return f"{comparison.median_ratio:.2f} × {comparison.peer} ({ours} vs {theirs} tok/s)"


def main() -> None:
    """Write the figure."""
    figure = draw(read_comparisons(RESULTS.read_text(encoding="utf-8")))
    figure.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
