"""Choices of kernels as files give them: whatever cannot be compiled is not a choice."""

from typing import Any

import pytest

from model.ops.triton.selection import Selection

TILE = {"m": 16, "n": 64, "k": 0, "warps": 4, "stages": 2}


def test_a_tile_of_powers_of_two_is_a_choice() -> None:
    Selection({"attention": {"decode": TILE}})


@pytest.mark.parametrize(
    "changes", [{"warps": 0}, {"warps": 3}, {"stages": 0}, {"n": 48}, {"m": -16}, {"k": True}]
)
def test_a_tile_that_no_compiler_takes_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not a tile"):
        Selection({"attention": {"decode": {**TILE, **changes}}})
