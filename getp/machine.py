"""The peaks of this machine, with a message when they are measured: about ten seconds."""

import torch

from getp.terminal import print_message
from model.cost import measure
from model.cost.devices import Device, device_of_driver


def local_device(target: torch.device | None = None, remeasure: bool = False) -> measure.Measured:
    """Return the measured device, from the cache unless `remeasure` is set.

    target None: the GPU if there is one, else the CPU.
    """
    if remeasure or measure.cached_device(target) is None:
        print_message("getp: measuring the peak speed of this machine (once; about 10 s)")
    return measure.local_device(target, remeasure)


def peaks_of(target: torch.device) -> Device:
    """Return the datasheet device of `target` if it is a known GPU, else its measured device."""
    known = None
    if target.type == "cuda":
        known = device_of_driver(measure.hardware_name(target))
    return known or local_device(target).device
