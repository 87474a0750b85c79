"""Numbers as people read them in tables, and as programs read them."""

import json
from collections.abc import Mapping
from typing import Any

_STEPS = ("", "k", "M", "G", "T", "P", "E", "Z")


def quantity(value: float) -> str:
    """Return three digits and a decimal prefix: 399000000 → `399M`, 0 → `-`."""
    if value == 0:
        return "-"
    step = 0
    while value >= 999.5 and step < len(_STEPS) - 1:
        value /= 1000
        step += 1
    if step == 0:
        return f"{value:.3g}"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}{_STEPS[step]}"


def seconds(value: float) -> str:
    """Return a time with the unit that suits it: µs, ms, s, min or h."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s")):
        if value < limit:
            return (
                f"{value * factor:.3g} {unit}"
                if value * factor < 100
                else (f"{value * factor:.0f} {unit}")
            )
    return f"{value / 60:,.1f} min" if value < 7200 else f"{value / 3600:,.1f} h"


def percent(share: float) -> str:
    """Return a share as per cent with one decimal."""
    return f"{share:.1%}"


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output."""
    print(json.dumps(value, indent=2))
