"""Which launches of a kernel have the same instructions with other numbers."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.model.triton_compiler import Launch

_ADDED = ("BIAS", "LIMIT", "ALPHA")  # what a kernel does in addition, with more registers
_TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_D", "BLOCK_T", "STAGES", "SHORT", "RUN")


def largest(found: Iterable["Launch"]) -> list["Launch"]:
    """Return the launches of which none differs from another in sizes alone.

    Of those that do, the one with the largest sizes, which needs the most registers and shared
    memory: others have the same instructions with other numbers. Forms with and without masks at
    the end of a row are different, and so are all tiles.
    """
    chosen: dict[Any, Launch] = {}
    for launch in found:
        form = _form(launch)
        if form not in chosen or _size(launch) > _size(chosen[form]):
            chosen[form] = launch
    return list(chosen.values())


def _form(launch: "Launch") -> tuple[Any, ...]:
    """Everything but sizes on which the instructions of a launch depend."""
    step = dict(launch.constants).get("BLOCK_K") or 1

    def kept(name: str, value: Any) -> Any:
        if name in _ADDED:
            return None
        if isinstance(value, bool | str | None) or (launch.is_tiled and name in _TILE):
            return value
        if launch.is_tiled and name in ("SIZE", "HIDDEN", "INNER"):
            return value % step == 0
        return value > 0

    form = tuple((name, kept(name, value)) for name, value in launch.constants)
    options = launch.options if launch.is_tiled else ()
    return launch.kernel, launch.types, launch.aligned, options, form


def _size(launch: "Launch") -> float:
    return math.prod(1 + x for _, x in launch.constants if isinstance(x, int | float) and x > 0)
