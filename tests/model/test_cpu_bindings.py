"""Finding, loading and calling the library of native CPU kernels; recording of its calls."""

import ctypes
import os
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch

from model.ops.cpu import backend as cpu
from model.ops.cpu import bindings
from model.ops.cpu.bindings import Kernels, KernelsError, kernels
from tests.model.ops_helpers import cpu_backend, linear_of, packed_linear, rand, reference


@pytest.fixture
def library() -> ctypes.CDLL:
    """The loaded library."""
    loaded = bindings.library()
    if loaded is None:
        pytest.skip("the native kernels were not built here")
    return loaded


def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bindings.VARIABLE, "none")
    assert bindings.library.__wrapped__() is None
    monkeypatch.setenv(bindings.VARIABLE, "sse")
    with pytest.raises(
        ValueError, match="must be none, avx2, avx_vnni, vnni, avx512, amx, not 'sse'"
    ):
        bindings.library.__wrapped__()


def test_a_library_that_is_older_than_its_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(bindings.VARIABLE, raising=False)
    monkeypatch.setattr(bindings, "__file__", str(tmp_path / "bindings.py"))
    file, source = tmp_path / f"_kernels{EXTENSION_SUFFIXES[0]}", tmp_path / "kernels/gemm/a.h"
    file.touch()
    source.parent.mkdir(parents=True)
    source.touch()
    assert not bindings.is_outdated(file)  # a copy, whose times say nothing
    later = file.stat().st_mtime + 3600
    os.utime(source, (later, later))
    with pytest.warns(UserWarning, match="is older than its sources; run `pip install -e .`"):
        assert bindings.library.__wrapped__() is None


def test_a_warning_says_why_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(bindings.VARIABLE, raising=False)
    monkeypatch.setattr(bindings, "__file__", str(tmp_path / "bindings.py"))
    with pytest.warns(UserWarning, match="they were not built"):
        assert bindings.library.__wrapped__() is None
    (tmp_path / "_kernels.so").write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="does not load"):
        assert bindings.library.__wrapped__() is None


def test_only_the_library_of_the_running_python_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each Python that installs getp from a checkout leaves a library there, maybe an old one."""
    monkeypatch.delenv(bindings.VARIABLE, raising=False)
    monkeypatch.setattr(bindings, "__file__", str(tmp_path / "bindings.py"))
    (tmp_path / "_kernels.cpython-30-other.so").touch()
    with pytest.warns(UserWarning, match="they were not built"):
        assert bindings.library.__wrapped__() is None
    # This library loads but lacks functions, like one that was built from older sources.
    (tmp_path / f"_kernels{EXTENSION_SUFFIXES[0]}").symlink_to(torch._C.__file__)
    with pytest.warns(UserWarning, match=r"does not load .*getp_has_level.*install again"):
        assert bindings.library.__wrapped__() is None


def test_without_kernels_and_bfloat16_in_onednn_torch_computes_linears(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a processor without AVX-512, where getp was installed without a compiler."""
    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    x, weight = (rand(rows, 64, seed=rows, dtype=torch.bfloat16) for rows in (3, 32))
    backend = cpu_backend(torch.bfloat16)
    packed = packed_linear(backend, weight)
    assert isinstance(packed.weight, torch.Tensor)
    assert not packed.weight.is_mkldnn
    expected = reference(torch.bfloat16).linear(x, linear_of(weight))
    torch.testing.assert_close(backend.linear(x, packed), expected)
    monkeypatch.setenv(bindings.VARIABLE, "")
    monkeypatch.setattr(bindings, "EXTENSION_SUFFIXES", [])
    bindings.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="dtype float32 is then faster"):
            bindings.library()
    finally:
        bindings.library.cache_clear()


def test_recordings_of_many_sizes_share_their_memory() -> None:
    backend = cpu_backend(torch.bfloat16)
    recorder: Any = backend.recorder()
    if recorder is None:
        pytest.skip("the native kernels were not built here")
    weights = [rand(64, 64, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    layers = [packed_linear(backend, weight) for weight in weights]
    x = rand(40, 64, seed=3, dtype=torch.bfloat16)

    def compute(rows: int) -> torch.Tensor:
        inner = x[:rows]
        for layer in layers:
            inner = backend.linear(inner, layer)
        return inner

    replays = {}
    for rows in range(40, 0, -1):
        replays[rows] = recorder(partial(compute, rows))
        replays[rows]()  # the result of the computation that was recorded
    for rows, replay in replays.items():
        torch.testing.assert_close(replay(), compute(rows), rtol=0, atol=0)
    assert recorder.buffer_count <= 4


def test_functions_and_argument_types_come_from_the_library(library: ctypes.CDLL) -> None:
    table = rand(5, 8)
    ids = torch.tensor([4, 0, 4])
    out = torch.empty(3, 8)
    kernels.gather(table.data_ptr(), 32, ids.data_ptr(), 3, out.data_ptr())
    assert torch.equal(out, table[ids])
    with pytest.raises(ctypes.ArgumentError):
        kernels.gather(table.data_ptr(), 32.5, ids.data_ptr(), 3, out.data_ptr())


@pytest.mark.parametrize("count", [0, 4, 6])
def test_a_wrong_number_of_arguments_is_an_error(library: ctypes.CDLL, count: int) -> None:
    with pytest.raises(TypeError, match=f"gather takes 5 arguments, not {count}"):
        kernels.gather(*[0] * count)


def test_a_function_that_the_library_lacks_is_named(library: ctypes.CDLL) -> None:
    loaded = Kernels()
    loaded.use(library, kernels.level)
    with pytest.raises(KernelsError, match=r"no function 'convolve'.*pip install -e"):
        loaded.convolve(1)


def test_recorded_calls_repeat_arguments_of_every_type(library: ctypes.CDLL) -> None:
    """The router takes pointers, integers and flags; the norm takes a float and a null pointer."""
    calls = b""

    class Recorded:
        def record_call(self, index: int, types: str, arguments: tuple[Any, ...]) -> None:
            nonlocal calls
            calls += bindings.pack_call(index, types, arguments)

    x, weight = rand(3, 32), rand(32, seed=1)
    normed, expert_ids = (
        torch.empty(3, 32, dtype=torch.bfloat16),
        torch.empty(3, 4, dtype=torch.int64),
    )
    weights = torch.empty(3, 4)
    recorded = Kernels()
    recorded.use(library, kernels.level)
    recorded.recorder = Recorded()
    recorded.add_rms_norm(
        x.data_ptr(), None, weight.data_ptr(), 3, 32, 0.5, None, normed.data_ptr(), 1
    )
    recorded.route(
        x.data_ptr(), None, 3, 32, 4, False, True, False, 1, 1, 1, 1.0, False,
        expert_ids.data_ptr(), weights.data_ptr(), 1,
    )  # fmt: skip
    results = normed, expert_ids, weights
    expected = [result.clone() for result in results]
    for result in results:
        result.zero_()
    recorded.replay(calls)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)
