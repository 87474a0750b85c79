"""The throughput figure of the README shows the figures of benchmarks/RESULTS.md."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import draw_throughput
from benchmarks.draw_throughput import Comparison, read_comparisons

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def comparisons() -> list[Comparison]:
    return read_comparisons(draw_throughput.RESULTS.read_text(encoding="utf-8"))


def test_every_table_row_with_a_ratio_is_read(comparisons: list[Comparison]) -> None:
    text = draw_throughput.RESULTS.read_text(encoding="utf-8")
    tables = text.split("getp / peer, each pair")[1:]
    rows = [line for table in tables for line in table.split("\n\n")[0].splitlines()[2:]]
    assert [c.median_ratio for c in comparisons] == [float(row.split("|")[-2]) for row in rows]
    assert all(c.machine and c.checkpoint and c.load and c.peer and c.pairs for c in comparisons)


def test_each_median_ratio_follows_from_its_pairs(comparisons: list[Comparison]) -> None:
    for c in comparisons:
        median = statistics.median(ours / theirs for ours, theirs in c.pairs)
        assert c.median_ratio == pytest.approx(median, abs=0.011), c


def test_an_empty_checkpoint_or_load_repeats_the_row_above() -> None:
    text = (
        "### A machine\n\n| checkpoint | load | getp / peer, each pair | median ratio |\n"
        "|---|---|---|---|\n| a | single | 10 / 5, 12 / 4.0 (one, bf16) | 2.50 |\n"
        "| | | 10 / 8 (llama.cpp) | 1.25 |\n\n| b | other | 1 / 2 (none) | 0.5 |\n"
    )
    assert read_comparisons(text) == [
        Comparison("A machine", "a", "single", "one", ((10, 5), (12, 4)), 2.5),
        Comparison("A machine", "a", "single", "llama.cpp", ((10, 8),), 1.25),
    ]


def test_the_bars_are_as_long_as_the_median_ratios(comparisons: list[Comparison]) -> None:
    pytest.importorskip("matplotlib")
    axes = draw_throughput.draw(comparisons).axes
    widths = [bar.get_width() for axis in axes for bar in axis.containers[0]]
    assert widths == [c.median_ratio for c in comparisons]
    assert [axis.get_title(loc="left") for axis in axes] == list(
        dict.fromkeys(c.machine for c in comparisons)
    )


def test_the_script_writes_the_figure_and_the_stored_one_is_current(
    comparisons: list[Comparison], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    for name in ("draw_throughput.py", "RESULTS.md"):
        (tmp_path / name).write_bytes((ROOT / "benchmarks" / name).read_bytes())
    subprocess.run([sys.executable, tmp_path / "draw_throughput.py"], check=True)
    drawn = (tmp_path / "throughput.svg").read_text(encoding="utf-8")
    stored = draw_throughput.FIGURE.read_text(encoding="utf-8")
    for c in comparisons:
        label = f"{c.median_ratio:.2f} × {c.peer} ("
        assert label in drawn
        assert label in stored
