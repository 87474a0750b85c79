"""The roofline and the operations on it as text for a terminal, on logarithmic axes."""

import math
import textwrap
from collections.abc import Sequence

from getp.errors import UsageProblem
from getp.units import quantity
from model.cost.devices import Device
from model.cost.workload import Op

_HEIGHT = 16
_MARGIN = 8  # columns left of the axis
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "123456789"


def operation_points(ops: Sequence[Op]) -> list[tuple[str, float]]:
    """Return (name, FLOPs per byte) of each operation with FLOPs (of any unit) and bytes."""
    found = []
    for op in ops:
        flops = op.flops.matrix + op.flops.vector + op.flops.special
        if flops and op.bytes.total:
            found.append((op.name, flops / op.bytes.total))
    return found


def group_points(points: Sequence[tuple[str, float]], decades: float) -> list[tuple[str, float]]:
    """Merge operations within that many decades of intensity, in ascending order.

    Points are (name, FLOPs per byte).
    """
    groups: list[list[tuple[str, float]]] = []
    for point in sorted(points, key=lambda point: point[1]):
        if groups and math.log10(point[1] / groups[-1][0][1]) < decades:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [(" + ".join(name for name, _ in group), group[0][1]) for group in groups]


def intensity_range(
    points: Sequence[tuple[str, float]], ridges: Sequence[float]
) -> tuple[int, int]:
    """Return the powers of ten between which all operations and ridge points lie."""
    values = [*(value for _, value in points), *ridges]
    return math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.5))


def check_count(devices: Sequence[Device], most: int) -> None:
    """Raise UsageProblem if a plot could not show the rooflines of so many devices."""
    if len(devices) > most:
        raise UsageProblem(
            "{plot}: {count} rooflines are too many for one plot; give at most {most} GPUs with "
            "{gpu}",
            count=len(devices),
            most=most,
        )


def roofline_text(ops: Sequence[Op], devices: Sequence[Device], dtype: str, width: int) -> str:
    """Return lines of at most `width` columns: rooflines drawn as digits, operations as letters.

    Raises UsageProblem for more devices than there are digits.
    """
    check_count(devices, len(_DIGITS))
    points = operation_points(ops)
    low, high = intensity_range(points, [device.ridge(dtype) for device in devices])
    columns = max(20, min(width, 120) - _MARGIN - 1)
    points = group_points(points, (high - low) / columns)  # one letter per column
    top = math.log10(max(device.peak(dtype) for device in devices) * 1.2)
    bottom = math.log10(min(device.bandwidth for device in devices)) + low
    grid = [[" "] * columns for _ in range(_HEIGHT)]

    def place(device: Device, log_intensity: float) -> tuple[int, int]:
        roof = min(math.log10(device.peak(dtype)), math.log10(device.bandwidth) + log_intensity)
        row = round((top - roof) / (top - bottom) * (_HEIGHT - 1))
        column = round((log_intensity - low) / (high - low) * (columns - 1))
        return min(row, _HEIGHT - 1), column

    for mark, device in zip(_DIGITS, devices, strict=False):
        for column in range(columns):
            row, _ = place(device, low + column * (high - low) / (columns - 1))
            grid[row][column] = mark
    for letter, (_, value) in zip(LETTERS, points, strict=False):
        for device in devices:
            row, column = place(device, math.log10(value))
            grid[row][column] = letter
    lines = ["FLOP/s"]
    for number, row_of_marks in enumerate(grid):
        flop_s = 10 ** (top - number * (top - bottom) / (_HEIGHT - 1))
        label = quantity(flop_s) if number % 3 == 0 else ""
        lines.append(f"{label:>{_MARGIN - 1}} |" + "".join(row_of_marks).rstrip())
    lines.append(" " * _MARGIN + "+" + "-" * columns)
    lines.append(_axis(low, high, columns))
    names = [f"{letter} = {name}" for letter, (name, _) in zip(LETTERS, points, strict=False)]
    roofs = [f"{mark} = {device.name}" for mark, device in zip(_DIGITS, devices, strict=False)]
    return "\n".join(
        [
            *lines,
            *wrap_items("rooflines: ", roofs, width),
            *wrap_items("operations: ", names, width),
        ]
    )


def _axis(low: int, high: int, columns: int) -> str:
    line = [" "] * (columns + _MARGIN + 12)
    for power in range(low, high + 1):
        at = _MARGIN + 1 + round((power - low) / (high - low) * (columns - 1))
        label = f"{10.0**power:g}"
        at = min(at, columns + _MARGIN + 1 - len(label))
        line[at : at + len(label)] = label
    return "".join(line).rstrip() + "\n" + " " * (_MARGIN + 1) + "FLOPs per byte"


def wrap_items(head: str, items: Sequence[str], width: int) -> list[str]:
    """Return `head` and the comma-separated items in lines of at most `width` columns.

    Lines break between items only, and are indented under the first item.
    """
    text = ", ".join(item.replace(" ", "\xa0") for item in items)
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\xa0", " ") for line in lines]
