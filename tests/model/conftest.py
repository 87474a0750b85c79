"""Fixtures of the model's tests."""

from collections.abc import Iterator

import pytest
import torch

from model.ops.cpu import backend
from model.ops.cpu.bindings import LEVELS
from tests.model.emulator import native_level


@pytest.fixture(params=["float32", *(f"bfloat16-{level}" for level in LEVELS)])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """Each dtype with each implementation: torch alone, and the kernels of each instruction set."""
    name, _, level = request.param.partition("-")
    if level in ("", "none"):
        monkeypatch.setattr(backend, "library", lambda: None)
        yield getattr(torch, name)
        return
    with native_level(level):
        yield getattr(torch, name)
