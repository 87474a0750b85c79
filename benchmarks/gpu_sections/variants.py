"""Variants of the kernels, to find out which part of one is at fault if a check fails."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from model.ops.backend import Backend

if TYPE_CHECKING:
    from model.ops.triton.tiles import Tiles

WITHOUT_OVERLAP = "without programmatic launch"
BY_TORCH = "by torch"


def _one_stage(tiles: "Tiles") -> "Tiles":
    from model.ops.triton.tiles import Tile

    def change(value: Any) -> Any:
        if isinstance(value, Tile):
            return replace(value, stages=1)
        return tuple(map(change, value)) if isinstance(value, tuple) else value

    return replace(
        tiles, **{each.name: change(getattr(tiles, each.name)) for each in fields(tiles)}
    )


def _small(tiles: "Tiles") -> "Tiles":
    """Return the smallest tiles there are, with everything else as it is."""
    from model.ops.triton.tiles import Tile, target_of

    small = target_of(torch.device("cpu")).tiles
    kept = {
        each.name: getattr(tiles, each.name)
        for each in fields(tiles)
        if not isinstance(getattr(small, each.name), (Tile, tuple))
    }
    return replace(small, **kept)


_CHANGES: dict[str, Callable[["Tiles"], "Tiles"]] = {
    WITHOUT_OVERLAP: lambda tiles: replace(tiles, programmatic_launch=False),
    "with single rows multiplied by torch": lambda tiles: replace(tiles, one_row=None),
    "without fused norms": lambda tiles: replace(
        tiles, fused_qkv=0, fused_gate_up=0, fused_mlp=0, fused_router=0
    ),
    "with one stage": _one_stage,
    "with small tiles": _small,
}
VARIANTS = (*_CHANGES, BY_TORCH)


@contextmanager
def changed_kernels(variant: str, operations: tuple[str, ...] = ()) -> Iterator[None]:
    """Change the kernels of all backends that are made in the context.

    BY_TORCH replaces these operations (methods of Backend) by the reference.
    """
    contexts: AbstractContextManager[Any] = nullcontext()
    if variant == BY_TORCH:
        from model.ops.triton.backend import TritonBackend

        contexts = patch.multiple(
            TritonBackend, **{name: getattr(Backend, name) for name in operations}
        )
    else:
        from model.ops.triton import tiles

        change = _CHANGES[variant]
        changed = {name: change(each) for name, each in tiles.TILES.items()}
        contexts = patch.dict(tiles.TILES, changed)
    with contexts:
        yield
