"""Copies of host tensors to the device."""

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device without blocking the host."""
    return pin(values, device).to(device, non_blocking=True)


def pin(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The host tensor in pinned memory, which the device can copy asynchronously."""
    return values if device.type == "cpu" else values.pin_memory()
