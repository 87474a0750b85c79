"""Quantities, durations and sizes as text for tables and sentences."""

import humanize

_MINUTES_FROM_S, _HOURS_FROM_S = 120, 7200


def quantity(value: float, unit: str = "") -> str:
    """Return three digits with a decimal prefix: 399e6 → `399M`, with a unit `399 MB`; 0 → `-`."""
    if value == 0:
        return "-"
    text = f"{value:.3g} {unit}" if value < 999.5 else humanize.metric(value, unit)
    return text if unit else text.replace(" ", "")


def duration(seconds: float) -> str:
    """Return a time in a suitable unit: μs, ms, s, min or h."""
    if seconds < _MINUTES_FROM_S:
        return humanize.metric(seconds, "s")
    if seconds < _HOURS_FROM_S:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds / 3600:,.1f} h"


def memory(size: int) -> str:
    """Return bytes with a binary prefix: `1.25 GiB`."""
    return humanize.naturalsize(size, binary=True, format="%.2f")


def counted(number: int, noun: str) -> str:
    """Return a number with a noun in the singular or plural: `1 request`, `1,200 requests`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{share:.1%}"
