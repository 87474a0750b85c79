"""Copies between host and device that do not block the host."""

from typing import Any

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device without blocking the host."""
    return pin(values, device).to(device, non_blocking=True)


def pin(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The host tensor in pinned memory, which the device can copy asynchronously."""
    return values if device.type == "cpu" else values.pin_memory()


class HostCopy:
    """Tensors of one device, which are copied to the host without blocking it."""

    def __init__(self, *tensors: torch.Tensor):
        self._event: torch.cuda.Event | None = None
        on_gpu = tensors[0].device.type == "cuda"
        # On a CPU a copy, too: the next replayed step writes its results to the same memory.
        self._tensors = [torch.empty_like(t, device="cpu", pin_memory=on_gpu) for t in tensors]
        for copy, tensor in zip(self._tensors, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if on_gpu:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[Any]:
        """Wait for the copies; returns each as nested lists."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._tensors]
