"""Tile sizes, warps and pipeline stages by architecture: the one place to tune.

Rows are chosen by hand from what a target's shared memory and registers hold; nothing is tuned
while a job runs. An architecture that is not listed uses the smallest tiles.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Tile:
    """m rows (tokens), n columns (keys or outputs), k of the contraction.

    Of the stages of attention half go to looking up blocks: 5 have two tiles of KV on their way.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """What a kernel launch takes."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Tiles:
    """The tiles of one architecture; k of attention is the head size and not used."""

    decode: Tile  # attention of single tokens; m is the least height of a matrix product
    prefill: Tile  # attention of chunks, head size up to 64
    prefill_wide: Tile  # the same for larger heads
    experts: tuple[Tile, ...]  # by rising m: the first that holds an expert's mean rows is used
    mxfp4: tuple[Tile, ...]  # the same for packed weights
    short: int = 0  # rows of a tile for what is left of an expert's rows, if they fit; 0: no such
    fused: Tile = Tile(16, 32, 128, 4, 3)  # norm with linear or MLP; m is not used
    # Up to how many rows (64 at most) a norm and what follows are one kernel: as many as
    # `gpu.py --section fusions` finds that faster for. 0: not measured.
    fused_qkv: int = 0
    fused_gate_up: int = 0
    fused_mlp: int = 0
    # Of one row: at most n rows of weight a program and k columns a step, more of fewer rows.
    # None: one row is like others, and products without a norm are torch's.
    one_row: Tile | None = None
    programmatic_launch: bool = False  # see programmatic_launch.py


_HOPPER = Tiles(
    decode=Tile(16, 64, 0, 4, 5),
    prefill=Tile(128, 64, 0, 8, 5),
    prefill_wide=Tile(128, 64, 0, 8, 5),
    experts=(Tile(16, 64, 128, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
    mxfp4=(Tile(16, 64, 128, 4, 4), Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
    # Of 1024 tokens gpt-oss' experts get 128 each, give or take 11: every other has a second tile.
    short=32,
    fused=Tile(16, 32, 128, 2, 5),  # with 4 warps each would read all of x, for half of the weight
    # Not measured: by counting what a program loads, and every launch saved is two microseconds.
    fused_qkv=1,
    fused_gate_up=1,
    one_row=Tile(1, 16, 256, 4, 4),
    programmatic_launch=True,  # not measured either
)
_BLACKWELL = replace(  # Hopper's spill there: attention's, and with 64 of k those of 128 experts
    _HOPPER,
    prefill=Tile(64, 64, 0, 4, 4),
    experts=(Tile(16, 64, 128, 4, 3), Tile(64, 64, 128, 4, 2), Tile(128, 128, 64, 8, 3)),
    mxfp4=(Tile(16, 64, 128, 4, 4), Tile(64, 64, 128, 4, 3), Tile(128, 128, 64, 8, 3)),
)
_AMPERE = Tiles(
    decode=Tile(16, 64, 0, 4, 5),
    prefill=Tile(128, 64, 0, 8, 4),
    prefill_wide=Tile(128, 32, 0, 8, 4),
    experts=(Tile(16, 64, 128, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 64, 64, 8, 3)),
    mxfp4=(Tile(16, 64, 128, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 64, 64, 8, 3)),
    fused=Tile(16, 32, 64, 4, 3),
)
_CDNA = Tiles(
    decode=Tile(16, 64, 0, 4, 2),
    prefill=Tile(128, 32, 0, 4, 2),
    prefill_wide=Tile(128, 32, 0, 4, 2),
    experts=(Tile(16, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2), Tile(128, 64, 64, 8, 2)),
    mxfp4=(Tile(16, 64, 128, 4, 2), Tile(64, 64, 64, 4, 2), Tile(128, 64, 64, 8, 2)),
    fused=Tile(16, 16, 32, 4, 2),
)
_SMALL = Tiles(
    decode=Tile(16, 32, 0, 4, 2),
    prefill=Tile(64, 32, 0, 4, 2),
    prefill_wide=Tile(64, 32, 0, 8, 2),
    experts=(Tile(16, 64, 64, 4, 2), Tile(64, 64, 32, 4, 2)),
    mxfp4=(Tile(16, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2)),
    fused=Tile(16, 32, 32, 4, 2),
)
TILES: dict[str, Tiles] = {
    "sm_80": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx950": _CDNA,
    "gfx1201": _SMALL,
}


@dataclass(frozen=True)
class Target:
    """A device as launches need to know it."""

    architecture: str  # as compilers spell it: sm_90, gfx942; "none" in Triton's interpreter
    processors: int  # multiprocessors or compute units: about as many programs run at once
    tiles: Tiles

    @property
    def vendor(self) -> str:
        """The vendor whose instructions a kernel may use: "nvidia", "amd" or "none"."""
        return {"sm": "nvidia", "gf": "amd"}.get(self.architecture[:2], "none")

    @property
    def launch_options(self) -> dict[str, Any]:
        """Arguments of every launch: whether its programs may start before they may read."""
        if self.tiles.programmatic_launch:
            return {"PROGRAMMATIC_LAUNCH": True, "launch_pdl": True}
        return {"PROGRAMMATIC_LAUNCH": False}


def target_of(device: torch.device) -> Target:
    """Return what launches on a device need; the CPU stands for Triton's interpreter."""
    if device.type != "cuda":
        return Target("none", 4, _SMALL)
    properties = torch.cuda.get_device_properties(device)
    architecture = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        architecture = str(properties.gcnArchName).split(":")[0]
    tiles = TILES.get(architecture, _SMALL)
    return Target(architecture, int(properties.multi_processor_count), tiles)


def for_dtype(tile: Tile, dtype: torch.dtype) -> Tile:
    """The tile where an element takes 2 bytes; a small one in float32, which only checks use."""
    if dtype.itemsize <= 2:
        return tile
    return Tile(min(tile.m, 32), min(tile.n, 32), min(tile.k, 32), 4, 1)
