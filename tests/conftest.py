"""Checkpoints that several tests read; made once a run, removed after it."""

import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from model.cost import measure
from tests.checkpoints import Peer, write_checkpoint

# The models are tiny: handing work to a second thread costs more than it saves.
torch.set_num_threads(1)
# A shell lets what it starts in the background ignore Ctrl-C, and tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _measured_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no test, nor what it starts, measure this machine or touch the user's cache."""
    cpu = torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        entry = {"date": "2030-01-02", "peaks": {"float32": 1e11, "bfloat16": 1e11}}
        rates = {"bandwidth": 1e10, "launch_s": 1e-6, "memory": 2**33}
        patch.setattr(measure, "default_target", lambda: cpu)
        measure.write_cache({measure.cache_key(cpu): entry | rates})
        yield


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
