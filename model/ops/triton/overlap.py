"""A kernel that is set up while the one before it ends, on GPUs that can: `Tiles.overlap`.

A launch costs what it takes to bring programs onto the device and to let the last of them go. With
few rows that is as long as the work itself. Where overlap is on, the programs of the next kernel
come onto the device as soon as all of this one's are there, and wait before they touch memory
(NVIDIA calls it programmatic dependent launch). Everywhere else the same kernels run one by one.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from model.ops.triton.tiles import tiles


@triton.jit
def wait_turn(OVERLAP: tl.constexpr):
    """Until all that was launched before has ended and can be seen: no kernel reads before it.

    Each waits, so that one that has its turn knows of all before it, not only of the last.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlap(device: torch.device) -> dict[str, Any]:
    """What every launch takes for it: whether to wait, and where so, that it may start early."""
    if tiles(device).overlap:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
