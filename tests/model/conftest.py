"""Fixtures of the model's tests."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.ops.cpu import backend
from model.ops.cpu.bindings import LEVELS
from tests.model.emulator import native_level
from tests.quantized_checkpoints import Encoder, Pair, Write, write_quantized

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton import language as tl
    from triton.runtime import interpreter

    def call_device_function(function: Any, *args: Any, **kwargs: Any) -> Any:
        """Triton's own way replaces the whole language in each call, a third of all time.

        The kernel has done so already, except for the module of Triton's own device functions.
        """
        if tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load):
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_device_function
    # Looking for overflows of integers takes another fifth; no test is near one.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


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
