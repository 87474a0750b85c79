"""Checkpoints that several tests read; they are created once per run and removed after it."""

import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from model.cost import measure
from tests.checkpoints import Peer, write_checkpoint

# The models are tiny: a second thread costs more than it saves.
torch.set_num_threads(1)
# A shell starts background processes with Ctrl-C ignored, but tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _measured_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests and their subprocesses from measuring this machine or using the user's cache."""
    cpu = torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        entry = {"date": "2030-01-02", "peaks": {"float32": 1e11, "bfloat16": 1e11}}
        rates = {"bandwidth": 1e10, "launch_s": 1e-6, "memory": 2**33, "rates": None}
        patch.setattr(measure, "default_target", lambda: cpu)
        measure.write_cache({measure.cache_key(cpu): entry | rates})
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a family → its checkpoint directory; copy it before changing it."""

    @cache
    def make(name: str) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / name, name)

    return make


@pytest.fixture(scope="session")
def peer(checkpoint: Callable[[str], Path]) -> Callable[[str], Peer]:
    """Name of a family → its checkpoint in transformers."""

    @cache
    def load(name: str) -> Peer:
        return Peer(checkpoint(name))

    return load
