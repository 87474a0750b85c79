"""Mode doctor: what it finds on a healthy machine, and that every fault is found and named."""

import errno
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from getp.analysis.doctor import conclusions, examine, host, processes
from getp.analysis.doctor.findings import Check
from getp.analysis.doctor.reports import (
    DeviceReport,
    Failed,
    KernelReport,
    LibraryReport,
    RatesReport,
    Report,
    Request,
    ScoreReport,
    Started,
)
from getp.cli import main as cli
from model.ops.cpu import bindings

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "data" / "model")
CHECK = {"name": str, "state": str, "finding": str, "remedy": (str, type(None)), "figures": dict}
KERNEL = {
    "backend": str, "model": str, "op": str, "label": str, "problem": (str, type(None)),
    "seconds": (float, type(None)), "bytes": int, "flops": int, "share": (float, type(None)),
    "state": str,
}  # fmt: skip
DIAGNOSIS = {
    "well": bool, "getp": str, "model": str, "seconds": float, "checks": list, "kernels": list,
}  # fmt: skip

needs_library = pytest.mark.skipif(
    bindings.library() is None, reason="the native kernels were not built here"
)


def has_fields(value: dict[str, Any], fields: dict[str, Any]) -> bool:
    """Whether an object has exactly these fields, of these types."""
    return value.keys() == fields.keys() and all(
        isinstance(value[name], kind) for name, kind in fields.items()
    )


def parsed(text: str) -> dict[str, Any]:
    """The one JSON object that the text is, which has the documented fields."""
    found = json.loads(text)
    assert has_fields(found, DIAGNOSIS)
    assert all(has_fields(check, CHECK) for check in found["checks"])
    assert all(has_fields(kernel, KERNEL) for kernel in found["kernels"])
    states = {one["state"] for one in [*found["checks"], *found["kernels"]]}
    assert states <= {"ok", "wrong", "skipped"}
    assert all(check["remedy"] for check in found["checks"] if check["state"] == "wrong")
    assert found["well"] == all(check["state"] != "wrong" for check in found["checks"])
    assert isinstance(found, dict)
    return found


def wrong(found: dict[str, Any]) -> dict[str, str]:
    """The findings of checks that found a problem, by name."""
    return {
        check["name"]: check["finding"] for check in found["checks"] if check["state"] == "wrong"
    }


def faulty_child(fault: str) -> list[str]:
    program = f"import sys; sys.path[0] = {str(ROOT)!r}; import tests.getp.doctor_child"
    return [sys.executable, "-c", program, fault]


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that lets child processes have a fault of doctor_child."""

    def inject(name: str) -> None:
        monkeypatch.setattr(processes, "child_command", lambda: faulty_child(name))

    return inject


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that replaces child processes by a program, which has the request as `request`."""

    def replace(body: str) -> None:
        program = (
            f"import os, sys, time; sys.path[0] = {str(ROOT)!r}\n"
            "from getp.analysis.doctor import reports\n"
            "from getp.analysis.doctor.reports import *\n"
            "def say(report): print(reports.write(report), flush=True)\n"
            "request = Request.read(sys.argv[-1])\n" + body
        )
        monkeypatch.setattr(processes, "child_command", lambda: [sys.executable, "-c", program])

    return replace


def test_a_healthy_machine_is_well_on_every_instruction_set(
    capfd: pytest.CaptureFixture[str],
) -> None:
    status = cli.run([MODEL, "-m", "doctor", "--json", "--device", "cpu"])
    found = parsed(capfd.readouterr().out)
    assert wrong(found) == {}
    assert (status, found["well"]) == (0, True)
    names = {check["name"] for check in found["checks"]}
    assert names >= {"versions", "CPU", "memory", "speed of the CPU", "temporary files", "Ray"}
    library = bindings.library()
    levels = {"torch"}
    if library is not None:
        levels |= {name for name in bindings.LEVELS[1:] if bindings.has_level(library, name)}
    assert {kernel["backend"] for kernel in found["kernels"]} == levels
    assert names >= {f"{check}, {level}" for check in ("kernels", "answers") for level in levels}
    operations = {kernel["op"] for kernel in found["kernels"]}
    assert operations >= {"linear", "attention", "experts", "logits", "sample"}
    assert all(kernel["share"] > 0 for kernel in found["kernels"])


@needs_library
def test_a_wrong_kernel_is_named_and_the_status_is_1(
    fault: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    fault("wrong linear")
    assert cli.run([MODEL, "-m", "doctor", "--json", "--device", "cpu"]) == 1
    found = parsed(capfd.readouterr().out)
    bad = {kernel["op"] for kernel in found["kernels"] if kernel["state"] == "wrong"}
    assert "linear" in bad
    assert bad <= {"linear", "norm_qkv", "norm_mlp"}  # which use linear
    (name,) = (name for name in wrong(found) if name.startswith("kernels"))
    assert "linear (attention's output, 1 rows; the embedded model)" in wrong(found)[name]
    assert "differs by" in wrong(found)[name]


@needs_library
@pytest.mark.parametrize(
    ("name", "op", "cause"),
    [
        ("crash", "route", "the process crashed: Illegal instruction (SIGILL)"),
        ("raise", "embed", "ZeroDivisionError: of the test"),
    ],
)
def test_a_kernel_that_crashes_is_named_and_the_other_checks_run(
    name: str,
    op: str,
    cause: str,
    fault: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    fault(name)
    assert cli.run([MODEL, "-m", "doctor", "--json", "--device", "cpu"]) == 1
    found = parsed(capfd.readouterr().out)
    bad = [kernel for kernel in found["kernels"] if kernel["state"] == "wrong"]
    assert {kernel["op"] for kernel in bad} == {op}
    assert len(bad) > 1  # every case of it: the series goes on after a crash
    assert {kernel["problem"] for kernel in bad} == {cause}
    operations = {kernel["op"] for kernel in found["kernels"] if kernel["state"] == "ok"}
    assert operations >= {"linear", "attention", "experts", "sample"}
    assert {check["name"] for check in found["checks"]} >= {"Ray", "temporary files"}


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("missing library", "they were not built"),
        ("damaged library", "does not load"),
    ],
)
def test_a_library_that_cannot_be_used_is_a_problem_and_torch_is_checked(
    name: str, finding: str, fault: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    fault(name)
    assert cli.run([MODEL, "-m", "doctor", "--json", "--device", "cpu"]) == 1
    found = parsed(capfd.readouterr().out)
    assert finding in wrong(found)["native kernels"]
    assert {kernel["backend"] for kernel in found["kernels"]} == {"torch"}
    assert wrong(found).keys() == {"native kernels"}


def test_the_table_fits_80_columns_and_says_what_to_do(
    fault: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fault("missing library")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TMPDIR", "/sys")  # where not even root can create a file
    assert cli.run([MODEL, "-m", "doctor", "--device", "cpu"]) == 1
    out = capfd.readouterr().out
    tables = out.split("\n\n")
    assert max(map(len, tables[0].splitlines())) <= 80
    text = " ".join(out.split())
    assert "native kernels wrong" in text
    assert "temporary files wrong /sys cannot be written" in text
    assert "What to do: set TMPDIR to a folder on a disk with room." in text
    assert "2 problems found" in text


def test_json_needs_neither_rich_nor_torch_in_the_process() -> None:
    program = f"""
import sys
sys.modules["rich"] = None
from getp.cli.main import run
from getp.analysis.doctor import processes
processes.child_command = lambda: {faulty_child("none")!r}
status = run([{MODEL!r}, "-m", "doctor", "--json", "--device", "cpu"])
sys.exit(status or (9 if "torch" in sys.modules else 0))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert parsed(done.stdout)["well"], done.stdout
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_that_cannot_be_used_is_an_error_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mystery"}')
    assert cli.run([str(tmp_path), "-m", "doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "mystery" in err


def test_a_process_that_hangs_is_ended_and_the_next_task_runs(
    child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "TASK_LIMIT_S", 5.0)
    child(
        "if not request.first: say(Started(0, 'linear: a', 'm')); time.sleep(600)\n"
        "say(Started(1, 'linear: b', 'm')); say(Failed('linear: b', 'x', 'm')); say(Ended())"
    )
    found = [*processes.run_tasks(Request("cpu", ()))]
    cause = "nothing happened for 5 s, so the process was ended"
    assert found[:2] == [Started(0, "linear: a", "m"), Failed("linear: a", cause, "m")]
    assert found[2:] == [Started(1, "linear: b", "m"), Failed("linear: b", "x", "m")]


def test_processes_that_crash_in_every_task_are_not_restarted_forever(
    child: Callable[[str], None],
) -> None:
    child("say(Started(request.first, f'task {request.first}')); os.abort()")
    failed = [one for one in processes.run_tasks(Request("cpu", ())) if isinstance(one, Failed)]
    crashed = [f"task {number}" for number in range(processes.MAX_CRASHES + 1)]
    assert [one.name for one in failed] == [*crashed, "remaining checks"]
    assert failed[0].cause == "the process crashed: Aborted (SIGABRT)"


def test_tasks_after_a_fault_of_the_gpu_run_in_another_process(
    child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from getp.analysis.doctor.child import _gpu_works

    def fault(*arguments: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert _gpu_works()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    assert not _gpu_works()
    child(
        "say(Started(request.first, 'a: b', 'm')); say(Failed('a: b', str(request.first), 'm'))\n"
        "if request.first == 2: say(Ended())"
    )
    found = [one for one in processes.run_tasks(Request("cuda", ())) if isinstance(one, Failed)]
    assert [one.cause for one in found] == ["0", "1", "2"]


def test_a_process_that_ends_before_its_first_task_is_reported_with_its_last_message(
    child: Callable[[str], None],
) -> None:
    child("print('libtorch.so is missing', file=sys.stderr); sys.exit(3)")
    assert [*processes.run_tasks(Request("cpu", ()))] == [
        Failed(
            "start of a child process", "the process ended with status 3: libtorch.so is missing"
        )
    ]


def test_a_device_that_does_not_exist_is_one_finding() -> None:
    found = [*processes.run_tasks(Request("cuda:99", (MODEL,)))]
    assert len(found) == 1
    assert isinstance(found[0], Failed)
    assert "cuda:99 does not exist: torch finds" in found[0].cause


def test_a_check_that_raises_is_wrong_and_does_not_end_the_others(
    child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Check:
        raise ZeroDivisionError("of the test")

    child("say(Ended())")
    monkeypatch.setattr(host, "ray_check", fails)
    diagnosis = examine.examine("m", (), "cpu", lambda text: None)
    assert [check.finding for check in diagnosis.wrong] == ["ZeroDivisionError: of the test"]
    assert len(diagnosis.checks) == 2 + len(host.FOLDERS)


# Disks


def temporary_check() -> Check:
    return host.folder_check("temporary files", host.temporary_folder, "TMPDIR")


def test_a_usable_temporary_folder_is_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert temporary_check().state == "ok"
    assert [*tmp_path.iterdir()] == []


def test_a_temporary_folder_that_cannot_be_written_is_wrong_even_if_python_uses_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, words in (
        ("/sys", "/sys cannot be written"),
        (str(tmp_path / "none"), "does not exist"),
    ):
        monkeypatch.setenv("TMPDIR", folder)
        assert Path(tempfile.gettempdir()) != Path(folder)
        found = temporary_check()
        assert found.state == "wrong"
        assert words in found.finding
        assert "TMPDIR" in (found.remedy or "")


def test_a_full_disk_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    usage = SimpleNamespace(free=5 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        found = temporary_check()
    assert (found.state, found.finding) == ("wrong", f"{tmp_path} has only 5.00 MiB free")

    def no_room(**options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", no_room)
    found = temporary_check()
    assert found.state == "wrong"
    assert "No space left on device" in found.finding


def test_a_folder_that_does_not_exist_yet_is_checked_where_it_will_be(tmp_path: Path) -> None:
    found = host.folder_check("measurements", lambda: tmp_path / "a" / "b", "XDG_CACHE_HOME")
    assert found.state == "ok"
    assert [*tmp_path.iterdir()] == []


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
        ({"torch": "2.9.1"}, "wrong", "torch 2.9.1 is too old"),
        ({}, "wrong", "torch is not installed"),
    ],
)
def test_an_old_or_missing_torch_is_wrong(
    installed: dict[str, str], state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(monkeypatch, **installed)
    found = host.version_check()
    assert found.state == state
    assert words in found.finding


@pytest.mark.parametrize(
    ("installed", "state"),
    [({"ray": "2.60.0"}, "ok"), ({"ray": "2.9.3"}, "wrong"), ({}, "skipped")],
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
def test_a_gpu_far_below_its_data_sheet_is_wrong(measured: RatesReport, words: str) -> None:
    found = conclusions.rates_check(measured, gpu())
    assert found.state == "wrong"
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
        assert (found.name, found.state) == ("GPU", "wrong")
        assert words in found.finding
    assert conclusions.memory_check(gpu()).state == "ok"
    assert conclusions.memory_check(gpu(free=1 << 20)).state == "wrong"


def test_a_gpu_that_torch_does_not_find_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conclusions, "_NODES", (str(tmp_path),))
    found = conclusions.device_check(
        gpu(type="cpu", torch_build="CUDA 13.0", notices=("the driver is too old",))
    )
    assert (found.name, found.state) == ("GPU", "wrong")
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
    from getp.analysis.doctor.device import is_built_for

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


def test_a_kernel_that_ended_its_process_is_a_wrong_kernel() -> None:
    series = conclusions.Series("avx512", failed=[Failed("linear: 1 rows", "crashed", "m")])
    (found,) = conclusions.kernels_of(series, None)
    assert (found.backend, found.op, found.label) == ("avx512", "linear", "1 rows")
    (check,) = conclusions.checks_of(series)
    assert check.finding == "1 of 1 wrong: linear (1 rows; m): crashed"
    assert "GETP_CPU_KERNELS" in (check.remedy or "")


@pytest.mark.parametrize(
    ("fields", "state", "words"),
    [
        ({"captured": True}, "ok", "decode steps are replayed"),
        ({"captured": False}, "wrong", "not replayed: no memory for it"),
        ({"captured": False, "can_capture": False}, "skipped", "not recorded"),
    ],
)
def test_steps_that_could_be_replayed_but_are_not_are_wrong(
    fields: dict[str, Any], state: str, words: str
) -> None:
    report = ScoreReport(
        **{"backend": "triton", "right": 300, "questions": 300, "seconds": 1.0,
           "can_capture": True, "notices": ("no memory for it",), **fields}
    )  # fmt: skip
    found = conclusions.replay_check(report)
    assert found.state == state
    assert words in found.finding


@pytest.mark.parametrize(("right", "state"), [(300, "ok"), (285, "ok"), (284, "wrong")])
def test_fewer_than_95_percent_of_right_answers_are_wrong(right: int, state: str) -> None:
    report = ScoreReport("amx", right, 300, 1.0, True, True)
    assert conclusions.score_check(report).state == state


def test_kernels_that_the_user_has_switched_off_are_no_problem() -> None:
    found = conclusions.library_check(LibraryReport("none", chosen_by_user=True))
    assert (found.state, found.finding) == ("ok", "none, as GETP_CPU_KERNELS says")


@needs_library
def test_kernels_of_a_dtype_without_native_kernels_are_those_of_torch() -> None:
    import torch

    from getp.analysis.doctor.kernels import backend_name
    from model.ops.cpu.backend import CpuBackend

    cpu = torch.device("cpu")
    assert backend_name(CpuBackend(cpu, torch.float32)) == "torch"
    assert backend_name(CpuBackend(cpu, torch.bfloat16)) == bindings.kernels.level


def test_reports_survive_the_way_from_the_child() -> None:
    from getp.analysis.doctor import reports

    examples: list[Report] = [
        Started(3, "linear: a", "m"), Failed("speed", "x"), gpu(notices=("a", "b")),
        LibraryReport("amx", ("none", "amx")), rates(1e9, 1e9), kernel(problem="p", seconds=None),
        ScoreReport("amx", 1, 2, 3.0, True, False, ("n",)),
    ]  # fmt: skip
    for report in examples:
        assert reports.read(reports.write(report)) == report
    assert reports.read("a warning of a library") is None
    request = Request("cuda", ("a", "b"), "amx", False, 7)
    assert Request.read(request.write()) == request
