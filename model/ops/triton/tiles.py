"""Tile sizes, warps and pipeline stages of each GPU architecture.

They are chosen by hand to fit a target's shared memory and registers; nothing is tuned while a job
runs. An architecture that is not listed uses those of the nearest older one of its vendor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Tile:
    """m rows (tokens), n columns (keys or outputs) and k elements of the contraction.

    In attention half of the stages serve the lookup of blocks: 5 stages keep two KV tiles in
    flight.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    max_registers: int = 0  # of a thread, NVIDIA only: fewer let more programs share a processor
    matrix_instruction: int = 0  # rows and columns of a matrix instruction, CDNA only: 16 or 32
    waves_per_simd: int = 0  # that must have room, CDNA only; 0 in these three: the compiler's own

    @property
    def options(self) -> dict[str, int]:
        """Arguments of a kernel launch."""
        asked = {
            "maxnreg": self.max_registers,
            "matrix_instr_nonkdim": self.matrix_instruction,
            "waves_per_eu": self.waves_per_simd,
        }
        chosen = {name: value for name, value in asked.items() if value}
        return {"num_warps": self.warps, "num_stages": self.stages, **chosen}


@dataclass(frozen=True)
class Tiles:
    """The tiles of one architecture. Attention does not use k, which is the head size."""

    # Attention of single tokens; m is the smallest height of a matrix instruction. Several warps
    # would compute the same scores and softmax, and wait for each other at barriers.
    decode: Tile  # head size up to 128
    decode_256: Tile  # larger heads
    prefill: Tile  # attention of chunks, head size up to 64
    prefill_wide: Tile  # attention of chunks, head size up to 128
    prefill_256: Tile  # attention of chunks, larger heads
    # Attention to latents of 512, of which a program computes at least 16 rows.
    decode_latent: Tile
    prefill_latent: Tile
    # By rising m: the first with room for an expert's mean rows is used. Tiles of one m are by
    # falling n: a narrow one is used where wide ones give too few programs.
    experts: tuple[Tile, ...]
    # The same for packed weights. Gate and up take two sums and twice as much of a stage.
    mxfp4_gate_up: tuple[Tile, ...]
    mxfp4_down: tuple[Tile, ...]
    # Weights of 4 and 8 bits, in linears and experts, chosen as those of experts: unpacked for
    # products in 16 bits, and e4m3 as it is. A step has at most the inputs that share a scale.
    quantized: tuple[Tile, ...]
    fp8: tuple[Tile, ...]
    # Up to so many last rows of an expert are computed with the rows before them, or in a tile of
    # this height if there are none. 0: they have a tile of their own.
    short: int = 0
    fused: Tile = Tile(16, 32, 128, 4, 3)  # norm with linear or MLP; m is not used
    # The largest numbers of rows (at most 64) for which a norm is fused with the operation after
    # it: up to there `gpu.py --section fusions` measured that to be faster. 0: not measured.
    fused_qkv: int = 0
    fused_gate_up: int = 0
    fused_mlp: int = 0
    # The same for a norm with the router after it, where a program multiplies a single row. Not
    # measured: up to 16 rows the programs of all rows run at once, and it saves two launches.
    fused_router: int = 16
    # With a KV cache in fp8, whose conversion takes registers: the most keys of a tile of chunks
    # with heads of up to 64 and with larger ones, and the fewest warps for single tokens.
    fp8_keys: int = 64
    fp8_keys_wide: int = 64
    fp8_warps: int = 1
    # For a single row: at most n weight rows a program and k columns a step; with fewer rows, more
    # columns. None: torch multiplies it where there is no norm, and `fused` is used where there is.
    one_row: Tile | None = None
    programmatic_launch: bool = False  # see programmatic_launch.py


# Two KV tiles of each program are in shared memory, and 6 programs share an H200's processor with
# heads of 128, 11 with heads of 64. Of each program at least one tile is on its way, together 88 to
# 96 KiB. At 4.3 TB/s and a latency of about 800 ns, 132 processors need 26 KB each (Little's law).
_NVIDIA_DECODE = Tile(16, 32, 0, 1, 5)
_NVIDIA_DECODE_256 = Tile(16, 32, 0, 2, 5)  # with one warp, registers would spill
# Two tiles of 18 KiB are in flight; with one warp the results of 16 heads would not fit.
_NVIDIA_DECODE_LATENT = Tile(16, 16, 0, 4, 5)
_HOPPER = Tiles(
    decode=_NVIDIA_DECODE,
    decode_256=_NVIDIA_DECODE_256,
    # Two programs share a processor: one multiplies while the other computes its softmax.
    prefill=Tile(128, 64, 0, 8, 4, max_registers=128),
    prefill_wide=Tile(64, 64, 0, 4, 4),
    prefill_256=Tile(128, 32, 0, 8, 4),
    decode_latent=_NVIDIA_DECODE_LATENT,
    prefill_latent=Tile(64, 16, 0, 8, 5),
    experts=(Tile(16, 64, 128, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
    # The highest tiles leave room for two programs: one multiplies while the other unpacks.
    mxfp4_gate_up=(Tile(16, 64, 128, 4, 4), Tile(64, 64, 64, 4, 3), Tile(128, 64, 64, 4, 3)),
    mxfp4_down=(Tile(16, 64, 128, 4, 6), Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 4, 4)),
    # Narrow tiles at few rows let every processor load weights: 4096 rows are 256 programs.
    quantized=(
        Tile(16, 64, 128, 4, 6),
        Tile(16, 16, 128, 1, 8),
        Tile(64, 64, 64, 4, 4),
        Tile(128, 128, 64, 8, 4),
    ),
    fp8=(
        Tile(16, 64, 128, 4, 6),
        Tile(16, 16, 128, 1, 8),
        Tile(64, 64, 128, 4, 4),
        Tile(128, 128, 128, 8, 4),
    ),
    # Of 1024 tokens each expert of gpt-oss gets 128 ± 11, so every other one has more than 128.
    short=32,
    fused=Tile(16, 32, 128, 2, 5),  # each of 4 warps would read all of x for half of the weights
    # Not measured: estimated from the bytes a program loads and 2 us saved for each launch.
    fused_qkv=1,
    fused_gate_up=1,
    one_row=Tile(1, 16, 256, 4, 3),
    programmatic_launch=True,  # not measured
)
_BLACKWELL = replace(  # Hopper's attention, expert and single-row tiles spill there
    _HOPPER,
    one_row=Tile(1, 8, 256, 4, 3),
    prefill=Tile(64, 64, 0, 4, 4),
    prefill_wide=Tile(128, 64, 0, 8, 5),
    prefill_256=Tile(64, 32, 0, 8, 4),
    experts=(Tile(16, 64, 128, 4, 3), Tile(64, 64, 128, 4, 2), Tile(128, 128, 64, 8, 3)),
    mxfp4_gate_up=(Tile(16, 64, 128, 4, 4), Tile(64, 64, 128, 4, 2), Tile(128, 128, 64, 8, 3)),
    mxfp4_down=(Tile(16, 64, 128, 4, 6), Tile(64, 64, 128, 4, 4), Tile(128, 128, 64, 8, 4)),
    # Hopper's two highest tiles spill where each 128 inputs have a scale.
    fp8=(*_HOPPER.fp8[:2], Tile(64, 64, 64, 4, 6), Tile(128, 64, 128, 4, 4)),
    fp8_keys=32,
    fp8_warps=2,
)
_AMPERE = Tiles(
    decode=_NVIDIA_DECODE,
    decode_256=_NVIDIA_DECODE_256,
    prefill=Tile(128, 64, 0, 8, 4),
    prefill_wide=Tile(128, 64, 0, 8, 4),
    prefill_256=Tile(64, 32, 0, 8, 4),
    decode_latent=_NVIDIA_DECODE_LATENT,
    prefill_latent=Tile(32, 16, 0, 8, 5),  # sm_86 has 99 KiB; with 4 warps, registers spill
    experts=(Tile(16, 64, 128, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 64, 64, 8, 3)),
    mxfp4_gate_up=(Tile(16, 64, 128, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 64, 32, 4, 4)),
    mxfp4_down=(Tile(16, 64, 128, 4, 4), Tile(64, 64, 64, 4, 4), Tile(128, 64, 32, 4, 4)),
    quantized=(
        Tile(16, 64, 128, 4, 4),
        Tile(16, 16, 128, 1, 6),
        Tile(64, 64, 64, 4, 4),
        Tile(128, 64, 32, 4, 4),
    ),
    fp8=(
        Tile(16, 64, 128, 4, 4),
        Tile(16, 16, 128, 1, 6),
        # Deeper, or with fewer warps, these spill where each 128 inputs have a scale.
        Tile(64, 64, 64, 4, 4),
        Tile(128, 64, 64, 8, 4),
    ),
    fused=Tile(16, 32, 64, 4, 3),
    fp8_keys_wide=32,
)
_CDNA = Tiles(
    # Tiles are loaded when they are needed: with two stages half as many programs fit. At 5.3 TB/s
    # and 900 ns, 304 compute units need 16 KB each on the way; each program loads 8 or 16 KiB.
    # With one wave, the wait before a counter's atomic addition covers all stores of a program.
    decode=Tile(16, 32, 0, 1, 1),
    decode_256=Tile(16, 16, 0, 1, 1),
    prefill=Tile(128, 32, 0, 4, 2),
    prefill_wide=Tile(128, 32, 0, 4, 2, matrix_instruction=16, waves_per_simd=2),
    prefill_256=Tile(128, 32, 0, 4, 2),
    decode_latent=Tile(16, 16, 0, 4, 1),
    prefill_latent=Tile(32, 16, 0, 4, 1),
    experts=(Tile(16, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2), Tile(128, 64, 64, 8, 2)),
    mxfp4_gate_up=(
        Tile(16, 64, 128, 4, 2),
        Tile(16, 16, 128, 1, 2),  # one wave: no barriers, and four times as many programs
        Tile(64, 64, 64, 4, 2),
        Tile(128, 64, 64, 8, 2),
    ),
    mxfp4_down=(
        Tile(16, 64, 128, 4, 2),
        Tile(16, 16, 128, 1, 2),  # one wave: no barriers, and four times as many programs
        Tile(64, 64, 64, 4, 2),
        Tile(128, 64, 64, 8, 2),
    ),
    quantized=(
        Tile(16, 64, 128, 4, 2),
        Tile(16, 16, 128, 1, 2),
        Tile(64, 64, 64, 4, 2),
        Tile(128, 64, 64, 8, 2),
    ),
    fp8=(
        Tile(16, 64, 128, 4, 2),
        Tile(16, 16, 128, 1, 2),
        Tile(64, 64, 128, 4, 2),
        Tile(128, 64, 64, 8, 2),  # twice as deep, it spills where each 128 inputs have a scale
    ),
    fused=Tile(16, 16, 32, 4, 2),
)
# The registers of these heads have room for two waves without asking.
_CDNA4 = replace(_CDNA, prefill_wide=Tile(128, 32, 0, 4, 2))
SMALL = Tiles(
    decode=Tile(16, 16, 0, 1, 1),  # with 32 keys, heads of 128 would spill on a Radeon
    decode_256=Tile(16, 16, 0, 1, 1),
    prefill=Tile(64, 32, 0, 4, 2),
    prefill_wide=Tile(64, 32, 0, 8, 2),
    prefill_256=Tile(64, 32, 0, 8, 2),
    decode_latent=Tile(16, 16, 0, 4, 1),
    prefill_latent=Tile(16, 16, 0, 8, 1),
    experts=(Tile(16, 64, 64, 4, 2), Tile(64, 64, 32, 4, 2)),
    mxfp4_gate_up=(Tile(16, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2)),
    mxfp4_down=(Tile(16, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2)),
    quantized=(Tile(16, 64, 64, 4, 2), Tile(16, 16, 64, 1, 2), Tile(64, 64, 64, 4, 2)),
    fp8=(Tile(16, 64, 64, 4, 2), Tile(16, 16, 64, 1, 2), Tile(64, 64, 64, 4, 2)),
    fused=Tile(16, 32, 32, 4, 2),
    fused_router=8,  # with 16 rows and 128 experts registers spill on a Radeon
)
_RDNA3 = replace(  # its matrix instructions take every operand twice, so larger tiles spill
    SMALL,
    decode=Tile(16, 16, 0, 4, 2),
    prefill=Tile(64, 32, 0, 8, 2),
    prefill_wide=Tile(64, 16, 0, 4, 2),
    mxfp4_gate_up=(Tile(16, 64, 64, 4, 2), Tile(64, 64, 64, 8, 2)),
    mxfp4_down=(Tile(16, 64, 64, 4, 2), Tile(64, 64, 64, 8, 2)),
)
TILES: dict[str, Tiles] = {
    "sm_80": _AMPERE,
    "sm_86": _AMPERE,  # 99 KiB of shared memory a program, like sm_89 and sm_120
    "sm_89": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_103": _BLACKWELL,
    # Without the asynchronous matrix instructions of sm_90 and sm_100.
    # With 64 keys, chunks with heads of 128 spill registers there.
    "sm_120": replace(_AMPERE, prefill_wide=Tile(128, 32, 0, 8, 4), fp8_warps=2),
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx950": _CDNA4,
    "gfx1100": _RDNA3,
    "gfx1151": _RDNA3,
    "gfx1201": SMALL,
}


def nearest_tiles(architecture: str) -> Tiles:
    """Return the tiles of an architecture, or of the nearest older one of its kind.

    Kinds are NVIDIA's GPUs, AMD's CDNA and AMD's RDNA. If all of its kind in TILES are newer, these
    are the smallest tiles.
    """
    older = [x for x in TILES if _kind(x) == _kind(architecture)]
    older = [x for x in older if _number(x) <= _number(architecture)]
    return TILES[max(older, key=_number)] if older else SMALL


def _number(architecture: str) -> int:
    """Return the version in the name, which AMD writes with hexadecimal digits."""
    digits = architecture.removeprefix("sm_").removeprefix("gfx")
    return int(digits, 10 if architecture.startswith("sm_") else 16)


def _kind(architecture: str) -> str:
    if architecture.startswith("sm_"):
        return "nvidia"
    return "rdna" if _number(architecture) >= 0x1000 else "cdna"


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
    def mxfp4_run(self) -> int:
        """How many neighbouring columns of a weight a lane holds in a matrix instruction.

        As Triton lays out operands in registers: 2 for Hopper's wgmma, 4 for mma.sync and for
        MFMA's 16 columns (gfx90a, gfx942), 8 for MFMA's 32 columns (gfx950) and for WMMA. On sm_100
        operands pass through tensor memory, so that it does not matter.
        """
        if self.vendor == "nvidia":
            return 2 if self.architecture in ("sm_90", "sm_100") else 4
        return 4 if self.architecture in ("gfx90a", "gfx942") else 8

    @property
    def mxfp4_rows(self) -> int:
        """How many rows of an MXFP4 weight are stored together, in the order of a wave's lanes.

        Lanes of MFMA and WMMA hold columns of 16 rows. Other GPUs exchange words through shared
        memory, in which they arrive.
        """
        return 16 if self.vendor == "amd" else 1

    @property
    def fp8(self) -> torch.dtype | None:
        """The form of e4m3 that the hardware converts: OCP's, or of gfx942 ("fnuz"); None: none."""
        if self.vendor == "nvidia":
            return torch.float8_e4m3fn if _number(self.architecture) >= 89 else None
        if self.architecture == "gfx942":
            return torch.float8_e4m3fnuz
        has_ocp = self.vendor == "none" or self.architecture == "gfx950"
        return torch.float8_e4m3fn if has_ocp or self.architecture[:5] == "gfx12" else None

    @property
    def launch_options(self) -> dict[str, Any]:
        """Arguments of every launch: whether its programs may start before they may read."""
        if self.tiles.programmatic_launch:
            return {"PROGRAMMATIC_LAUNCH": True, "launch_pdl": True}
        return {"PROGRAMMATIC_LAUNCH": False}


def target_of(device: torch.device) -> Target:
    """Return what launches on a device need; the CPU stands for Triton's interpreter."""
    if device.type != "cuda":
        return Target("none", 4, SMALL)
    architecture = architecture_of(device)
    processors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return Target(architecture, processors, nearest_tiles(architecture))


def architecture_of(device: torch.device) -> str:
    """Return the architecture of a GPU as compilers spell it: sm_90, gfx942."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def row_blocks(pairs: int, experts: int, height: int) -> int:
    """Return the maximum number of blocks of `height` rows that pairs of these experts can need."""
    used = min(pairs, experts)
    return used + (pairs - used) // height


def chosen_tile(
    choices: Sequence[Tile],
    mean_rows: float,
    blocks: Callable[[int], int],
    columns: int,
    processors: int,
) -> Tile:
    """Return the lowest tile with room for the mean number of rows (of an expert).

    Of tiles of that height the widest whose programs fill the device twice, else the narrowest.
    blocks: the number of row blocks, by their height.
    """
    height = next((tile.m for tile in choices if tile.m >= mean_rows), choices[-1].m)
    *wider, narrowest = (tile for tile in choices if tile.m == height)
    for tile in wider:
        if blocks(height) * -(-columns // tile.n) >= 2 * processors:
            return tile
    return narrowest


def for_dtype(tile: Tile, dtype: torch.dtype) -> Tile:
    """Return the tile, or a small one for float32, which only checks use."""
    if dtype.itemsize <= 2:
        return tile
    return Tile(min(tile.m, 32), min(tile.n, 32), min(tile.k, 32), 4, 1)
