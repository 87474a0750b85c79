"""The ops on a CPU."""

from model.ops.cpu.plain import attention, experts, linear, pack, pack_experts
from model.ops.reference import add_rms_norm, rotate_and_write, route, swiglu

__all__ = [
    "add_rms_norm",
    "attention",
    "experts",
    "linear",
    "pack",
    "pack_experts",
    "rotate_and_write",
    "route",
    "swiglu",
]
