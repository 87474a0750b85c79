"""Fixtures of the model's tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model.ops.cpu import backend
from model.ops.cpu.bindings import LEVELS
from tests.model.emulator import native_level
from tests.quantized_checkpoints import Encoder, Pair, Write, write_quantized


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


@pytest.fixture
def write(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Write:
    """Write a quantized checkpoint of a family, and the dense one with the same values."""

    def of(family: str, settings: dict[str, Any], encoder: Callable[[str], Encoder | None]) -> Pair:
        quantized, dense = tmp_path / "quantized", tmp_path / "dense"
        write_quantized(checkpoint(family), quantized, dense, settings, encoder)
        return quantized, dense

    return of
