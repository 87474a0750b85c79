"""The roofline as an image. Needs matplotlib, an optional dependency."""

from collections.abc import Sequence
from pathlib import Path

from getp.analysis.roofline_text import (
    LETTERS,
    check_count,
    group_points,
    intensity_range,
    operation_points,
    wrap_items,
)
from getp.errors import GetpError, UsageProblem
from model.cost.devices import Device
from model.cost.workload import Op

FORMATS = (".png", ".svg", ".pdf")
# The colours of Okabe and Ito, distinct for colour-blind readers, darkest first. Line styles and
# markers distinguish the roofs in black and white.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)))
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_ONE_LABEL = 0.06  # decades of intensity within which operations share a letter
_CAPTION_COLUMNS = 110


def check_plot(path: str) -> None:
    """Raise UsageProblem or GetpError now if a plot could not be written to `path` later."""
    if path == "-":
        return
    if Path(path).suffix.lower() not in FORMATS:
        raise UsageProblem(
            "{plot} {path}: the name must end in {suffixes}, or be - to draw on the terminal",
            path=path,
            suffixes=" or ".join(FORMATS),
        )
    try:
        import matplotlib  # noqa: F401 - checks that it is installed
    except ImportError:
        raise GetpError(
            "{plot} FILE needs matplotlib: pip install '{package}' (or pip install matplotlib); "
            "{plot} - draws on the terminal without it",
            package="getp[plot]",
        ) from None


def draw_roofline(
    ops: Sequence[Op], devices: Sequence[Device], dtype: str, title: str, path: str
) -> None:
    """Draw the roof of each device and the operations on it. Raises GetpError, UsageProblem."""
    check_plot(path)
    check_count(devices, len(_COLOURS))
    from matplotlib.figure import Figure

    points = operation_points(ops)
    low, high = intensity_range(points, [device.ridge(dtype) for device in devices])
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for device, colour, style, mark in zip(devices, _COLOURS, _STYLES, _MARKS, strict=False):
        peak, ridge = device.peak(dtype), device.ridge(dtype)
        axes.plot(
            [10.0**low, ridge, 10.0**high],
            [10.0**low * device.bandwidth, peak, peak],
            color=colour,
            linestyle=style,
            linewidth=1.6,
            marker="",
            zorder=2,
        )
        axes.plot(
            [value for _, value in points],
            [min(peak, value * device.bandwidth) for _, value in points],
            color=colour,
            linestyle="none",
            marker=mark,
            markerfacecolor="white",
            markersize=6,
            zorder=3,
        )
        axes.plot([], [], color=colour, linestyle=style, marker=mark, markerfacecolor="white",
                  label=f"{device.name} (ridge {ridge:,.0f})")  # fmt: skip
    groups = group_points(points, _ONE_LABEL)
    for letter, (_, value) in zip(LETTERS, groups, strict=False):
        axes.axvline(value, color="#999999", linewidth=0.6, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(letter, (value, 1.01), xycoords=("data", "axes fraction"), ha="center")
    axes.set(xscale="log", yscale="log", xlim=(10.0**low, 10.0**high))
    named = [f"{letter} {names}" for letter, (names, _) in zip(LETTERS, groups, strict=False)]
    axes.set_xlabel(
        "intensity (FLOPs per byte)\n" + "\n".join(wrap_items("", named, _CAPTION_COLUMNS))
    )
    axes.set_ylabel("FLOP/s")
    axes.set_title(title, fontsize=10, pad=20)
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.legend(loc="upper left", fontsize=8, framealpha=1)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise GetpError(f"cannot write {path}: {error.strerror}") from error
