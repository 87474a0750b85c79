"""Checkpoints that several tests read; made once a run, removed after it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.checkpoints import Peer, write_checkpoint

# The models are tiny: handing work to a second thread costs more than it saves.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name of a family → its checkpoint directory (not to be changed: copy it first)."""

    @cache
    def make(name: str) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / name, name)

    return make


@pytest.fixture(scope="session")
def peer(checkpoint: Callable[[str], Path]) -> Callable[[str], Peer]:
    """name of a family → its checkpoint in transformers."""

    @cache
    def load(name: str) -> Peer:
        return Peer(checkpoint(name))

    return load
