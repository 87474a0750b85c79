"""What the tests of quantized checkpoints share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import CheckpointError, Transformer, load_config, loader
from model.ops.backend import choose_backend
from tests.model.test_parity import logits_of, prompt
from tests.quantized_cases import CASES
from tests.quantized_checkpoints import Pair, Write, is_linear


def of_case(write: Write, name: str, family: str = "qwen2") -> Pair:
    settings, encoder = CASES[name]
    return write(family, settings, lambda module: encoder if is_linear(module) else None)


def compute_alike(quantized: Path, dense: Path) -> None:
    ids = prompt(20)
    expected = logits_of(dense, ids)
    difference = (logits_of(quantized, ids) - expected).abs().max()
    assert difference < 1e-5 * expected.abs().max()


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        loader.load(
            Transformer(load_config(folder)),
            folder,
            choose_backend(torch.device("cpu"), torch.float32),
        )
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
