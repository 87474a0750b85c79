"""What mode doctor concludes from the host and from the reports of child processes."""

import errno
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from getp.analysis.doctor import child, conclusions, host
from getp.analysis.doctor.device import is_built_for
from getp.analysis.doctor.findings import Check
from getp.analysis.doctor.reports import (
    DeviceReport,
    Failed,
    KernelReport,
    LibraryReport,
    RatesReport,
    ScoreReport,
)
from model.checks import ReferenceFailedError

ROOT = Path(__file__).resolve().parents[2]


# Disks


def temporary_check() -> Check:
    return host.folder_check(host.FOLDERS[0])


def test_a_usable_temporary_folder_is_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert temporary_check().state == "ok"
    assert [*tmp_path.iterdir()] == []


def test_a_temporary_folder_that_cannot_be_written_fails_even_if_python_uses_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, words in (
        ("/sys", "/sys cannot be written"),
        (str(tmp_path / "none"), "does not exist"),
    ):
        monkeypatch.setenv("TMPDIR", folder)
        assert Path(tempfile.gettempdir()) != Path(folder)
        found = temporary_check()
        assert found.state == "failed"
        assert words in found.finding
        assert "TMPDIR" in (found.remedy or "")


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    usage = SimpleNamespace(free=5 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        found = temporary_check()
    assert (found.state, found.finding) == ("failed", f"{tmp_path} has only 5.00 MiB free")

    def no_room(**options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", no_room)
    found = temporary_check()
    assert found.state == "failed"
    assert "No space left on device" in found.finding


def test_a_folder_that_does_not_exist_yet_is_checked_where_it_will_be(tmp_path: Path) -> None:
    found = host.folder_check(host.Folder("measurements", lambda: tmp_path / "a" / "b", "A"))
    assert found.state == "ok"
    assert [*tmp_path.iterdir()] == []


def test_a_cache_of_models_that_cannot_be_written_is_no_problem() -> None:
    folder = host.Folder("models", lambda: Path("/sys/hub"), "HF_HOME", is_needed=False)
    found = host.folder_check(folder)
    assert found.state == "skipped"
    assert "cannot be written" in found.finding


# Versions


def versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(
    ("installed", "state", "words"),
    [
        ({"torch": "2.13.0+cpu"}, "ok", "torch 2.13.0+cpu"),
        ({"torch": "2.9.1"}, "failed", "torch 2.9.1 is too old"),
        ({}, "failed", "torch is not installed"),
    ],
)
def test_an_old_or_missing_torch_fails(
    installed: dict[str, str], state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(monkeypatch, **installed)
    found = host.version_check()
    assert found.state == state
    assert words in found.finding


@pytest.mark.parametrize(
    ("installed", "state"),
    [({"ray": "2.60.0"}, "ok"), ({"ray": "2.9.3"}, "failed"), ({}, "skipped")],
)
def test_ray_need_not_be_installed_but_must_be_new_enough(
    installed: dict[str, str], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(monkeypatch, **installed)
    found = host.ray_check()
    assert found.state == state
    assert state == "ok" or "getp[cluster]" in f"{found.finding} {found.remedy}"


def test_the_oldest_versions_are_those_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name, numbers in host.MINIMUM.items():
        assert f'"{name}>={".".join(map(str, numbers))}"' in text


# What reports mean


def gpu(**changes: Any) -> DeviceReport:
    fields = {
        "type": "cuda", "name": "NVIDIA H100 80GB HBM3", "count": 8, "memory": 80 << 30,
        "free": 79 << 30, "torch_build": "CUDA 13.0", "driver": "580.65", "architecture": "sm_90",
        "processors": 132,
    }  # fmt: skip
    return DeviceReport(**{**fields, **changes})


def rates(bandwidth: float, product: float) -> RatesReport:
    return RatesReport(bandwidth, bandwidth, 5e-6, {"float32": 5e13, "bfloat16": product})


def test_the_speed_of_a_known_gpu_is_compared_with_its_data_sheet() -> None:
    found = conclusions.rates_check(rates(3.0e12, 7e14), gpu())
    assert found.state == "ok"
    assert "read 3.00 TB/s (90%)" in found.finding
    assert "bfloat16 700 TFLOP/s (71%)" in found.finding
    assert found.figures["data_sheet"]["bandwidth"] == 3.35e12


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        (rates(1.2e12, 7e14), "memory far below"),
        (RatesReport(3e12, 3e12, 5e-6, {"float32": 1e13, "bfloat16": 1e14}), "products far below"),
    ],
)
def test_a_gpu_far_below_its_data_sheet_fails(measured: RatesReport, words: str) -> None:
    found = conclusions.rates_check(measured, gpu())
    assert found.state == "failed"
    assert words in found.finding


def test_a_device_without_data_sheet_is_not_judged_by_its_speed() -> None:
    found = conclusions.rates_check(rates(1e9, 1e9), gpu(name="Unknown"))
    assert found.state == "ok"
    assert found.figures["data_sheet"] is None


def test_a_gpu_is_ok_only_with_kernels_triton_and_memory() -> None:
    assert conclusions.device_check(gpu()).state == "ok"
    assert "1 of 8 GPUs" in conclusions.device_check(gpu()).finding
    for changes, words in (
        ({"is_built_for": False}, "no kernels for sm_90"),
        ({"has_triton": False}, "Triton is not installed"),
    ):
        found = conclusions.device_check(gpu(**changes))
        assert (found.name, found.state) == ("GPU", "failed")
        assert words in found.finding
    assert conclusions.memory_check(gpu()).state == "ok"
    assert conclusions.memory_check(gpu(free=1 << 20)).state == "failed"


def test_a_gpu_that_torch_does_not_find_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conclusions, "_NODES", (str(tmp_path),))
    found = conclusions.device_check(
        gpu(type="cpu", torch_build="CUDA 13.0", notices=("the driver is too old",))
    )
    assert (found.name, found.state) == ("GPU", "failed")
    assert "built for CUDA 13.0) finds no GPU: the driver is too old" in found.finding


@pytest.mark.parametrize(
    ("architecture", "built", "expected"),
    [
        ("sm_90", ["sm_80", "sm_90"], True),
        ("sm_89", ["sm_80", "sm_90"], True),  # code of a lower minor version
        ("sm_103", ["sm_100"], True),
        ("sm_120", ["sm_80", "sm_90"], False),
        ("sm_120", ["sm_90", "compute_90"], True),  # compiled by the driver
        ("sm_70", ["sm_75", "compute_75"], False),
        ("gfx942", ["gfx90a", "gfx942"], True),
        ("gfx950", ["gfx90a", "gfx942"], False),
    ],
)
def test_is_built_for_follows_the_rules_of_compatibility(
    architecture: str, built: list[str], expected: bool
) -> None:
    assert is_built_for(architecture, built) == expected


def kernel(**changes: Any) -> KernelReport:
    fields = {
        "backend": "amx", "model": "m", "op": "linear", "label": "1 rows", "dtype": "bfloat16",
        "problem": None, "seconds": 2e-3, "bytes": 1_000_000, "flops": 1_000_000,
    }  # fmt: skip
    return KernelReport(**{**fields, **changes})


def test_a_share_is_that_of_the_limit_by_bytes_or_by_flops() -> None:
    limits = RatesReport(0.8e9, 1e9, 1e-6, {"float32": 1e8, "bfloat16": 1e9})
    series = conclusions.Series("amx", kernels=[kernel(), kernel(flops=0, bytes=200_000)])
    assert [one.share for one in conclusions.kernels_of(series, limits)] == [0.5, 0.1]
    series = conclusions.Series("amx", kernels=[kernel(flops=10**7), kernel(dtype="float16")])
    assert [one.share for one in conclusions.kernels_of(series, limits)] == [5.0, 5.0]
    assert [one.share for one in conclusions.kernels_of(series, None)] == [None, None]


def test_a_kernel_that_ended_its_process_fails() -> None:
    series = conclusions.Series("avx512", failed=[Failed("linear: 1 rows", "crashed", "m")])
    (found,) = conclusions.kernels_of(series, None)
    assert (found.backend, found.op, found.label) == ("avx512", "linear", "1 rows")
    (check,) = conclusions.checks_of(series)
    assert check.finding == "1 of 1 failed: linear (1 rows; m): crashed"
    assert "GETP_CPU_KERNELS" in (check.remedy or "")


def test_a_kernel_without_memory_for_its_check_is_not_to_be_reported() -> None:
    failure = child._failed("linear: 1 rows", MemoryError("of the test"), "m")
    series = conclusions.Series("avx512", failed=[failure])
    assert conclusions.kernels_of(series, None) == []
    (check,) = conclusions.checks_of(series)
    assert (check.name, check.state) == ("linear: 1 rows", "failed")
    assert (check.remedy or "").startswith("free memory")


def test_a_failing_reference_says_nothing_about_kernels() -> None:
    error = ReferenceFailedError("linear: 1 rows: plain torch fails: RuntimeError: no device")
    failure = child._failed("linear: 1 rows", error, "m")
    series = conclusions.Series("avx512", failed=[failure, failure])
    assert conclusions.kernels_of(series, None) == []
    (check,) = conclusions.checks_of(series)
    assert (check.name, check.state) == ("plain torch, avx512", "failed")
    assert check.finding == f"{error}; 2 kernel checks could not be made"
    assert "torch" in (check.remedy or "")


@pytest.mark.parametrize(
    ("fields", "state", "words"),
    [
        ({"captured": True}, "ok", "decode steps are replayed"),
        ({"captured": False}, "failed", "not replayed: no memory for it"),
        ({"captured": False, "can_capture": False}, "skipped", "not recorded"),
    ],
)
def test_steps_that_could_be_replayed_but_are_not_fail(
    fields: dict[str, Any], state: str, words: str
) -> None:
    report = ScoreReport(
        **{"backend": "triton", "right": 300, "questions": 300, "seconds": 1.0,
           "can_capture": True, "notices": ("no memory for it",), **fields}
    )  # fmt: skip
    found = conclusions.replay_check(report)
    assert found.state == state
    assert words in found.finding


@pytest.mark.parametrize(("right", "state"), [(300, "ok"), (285, "ok"), (284, "failed")])
def test_fewer_than_95_percent_of_correct_answers_fail(right: int, state: str) -> None:
    report = ScoreReport("amx", right, 300, 1.0, True, True)
    assert conclusions.score_check(report).state == state


def test_kernels_that_the_user_has_switched_off_are_no_problem() -> None:
    found = conclusions.library_check(LibraryReport("none", chosen_by_user=True))
    assert (found.state, found.finding) == ("ok", "none, as GETP_CPU_KERNELS says")
