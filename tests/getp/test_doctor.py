"""Mode doctor: what it finds on a healthy machine, and that every fault is found and named."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from getp.analysis.doctor import examine, host, processes, reports
from getp.analysis.doctor.conclusions import Series, checks_of
from getp.analysis.doctor.findings import Check, KernelCheck
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
    "ok": bool, "getp": str, "model": str, "seconds": float, "checks": list, "kernels": list,
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
    assert states <= {"ok", "failed", "skipped"}
    assert all(check["remedy"] for check in found["checks"] if check["state"] == "failed")
    assert found["ok"] == all(check["state"] != "failed" for check in found["checks"])
    assert isinstance(found, dict)
    return found


def failed(found: dict[str, Any]) -> dict[str, str]:
    """The findings of checks that found a problem, by name."""
    return {
        check["name"]: check["finding"] for check in found["checks"] if check["state"] == "failed"
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


def test_every_check_passes_on_every_instruction_set(
    capfd: pytest.CaptureFixture[str],
) -> None:
    status = cli.run([MODEL, "-m", "doctor", "--json", "--device", "cpu"])
    found = parsed(capfd.readouterr().out)
    assert failed(found) == {}
    assert (status, found["ok"]) == (0, True)
    names = {check["name"] for check in found["checks"]}
    assert names >= {"versions", "CPU", "memory", "speed of the CPU", "temporary files", "Ray"}
    library = bindings.library()
    levels = {"torch"}
    if library is not None:
        levels |= {name for name in bindings.LEVELS[1:] if bindings.has_level(library, name)}
    assert {kernel["backend"] for kernel in found["kernels"]} == levels
    assert names >= {f"{check}, {level}" for check in ("kernels", "answers") for level in levels}
    operations = {kernel["op"] for kernel in found["kernels"]}
    assert operations >= {"linear", "attention", "experts", "logits", "sample_rows"}
    assert all(kernel["share"] > 0 for kernel in found["kernels"])


@needs_library
def test_a_wrong_kernel_is_named_and_the_status_is_1(
    fault: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    fault("wrong linear")
    assert cli.run([MODEL, "-m", "doctor", "--json", "--device", "cpu"]) == 1
    found = parsed(capfd.readouterr().out)
    bad = {kernel["op"] for kernel in found["kernels"] if kernel["state"] == "failed"}
    assert "linear" in bad
    assert bad <= {"linear", "norm_qkv", "norm_mlp", "norm_experts"}  # which use linear
    (name,) = (name for name in failed(found) if name.startswith("kernels"))
    assert "linear (attention's output, 1 rows; the embedded model)" in failed(found)[name]
    assert "differs by" in failed(found)[name]


@needs_library
@pytest.mark.parametrize(
    ("name", "op", "cause"),
    [
        ("crash", "embed", "the process crashed: Illegal instruction (SIGILL)"),
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
    bad = [kernel for kernel in found["kernels"] if kernel["state"] == "failed"]
    assert {kernel["op"] for kernel in bad} == {op}
    assert len(bad) > 1  # every case of it: the series goes on after a crash
    assert {kernel["problem"] for kernel in bad} == {cause}
    operations = {kernel["op"] for kernel in found["kernels"] if kernel["state"] == "ok"}
    assert operations >= {"linear", "attention", "experts", "sample_rows"}
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
    assert finding in failed(found)["native kernels"]
    assert {kernel["backend"] for kernel in found["kernels"]} == {"torch"}
    assert failed(found).keys() == {"native kernels"}


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
    assert "native kernels failed" in text
    assert "temporary files failed /sys cannot be written" in text
    assert "What to do: set TMPDIR to a folder that can be written, on a disk with room." in text
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
    assert parsed(done.stdout)["ok"], done.stdout
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


def test_kernels_that_there_are_not_are_one_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bindings.VARIABLE, "fast")
    series = Series("native")
    for report in processes.run_tasks(Request("cpu", (MODEL,))):
        series.add(report)
    bad = [check for check in checks_of(series) if check.state == "failed"]
    assert [check.name for check in bad] == ["native kernels"]
    assert "must be none, avx2" in bad[0].finding
    assert bad[0].remedy == "change GETP_CPU_KERNELS in the environment, or unset it"


def test_memory_that_does_not_suffice_is_no_fault_of_getp(child: Callable[[str], None]) -> None:
    child(
        "from getp.analysis.doctor import child\n"
        "say(child._failed('kernels of m', RuntimeError(\"can't allocate memory\")))\n"
        "say(Started(0, 'answers')); say(Ended())"
    )
    series = Series("amx")
    for report in processes.run_tasks(Request("cpu", ())):
        series.add(report)
    (check,) = checks_of(series)
    assert "free memory" in (check.remedy or "")


def test_a_child_ends_with_its_parent() -> None:
    """Also if a signal ended the parent at once, so that it could not end the child."""
    parent = (
        "import os, subprocess, sys; from getp.analysis.doctor import processes\n"
        "from getp.analysis.doctor.reports import Request\n"
        "kept = subprocess.Popen\n"
        "def start(*args, **options):\n"
        "    child = kept(*args, **options); print(child.pid, flush=True); return child\n"
        "subprocess.Popen = start\n"
        f"next(processes.run_tasks(Request('cpu', ({MODEL!r},)))); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -9
    deadline = time.monotonic() + 20
    while _runs(int(done.stdout.split()[0])):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process: int) -> bool:
    """Whether the process exists, and is not only waited for."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def test_a_check_that_raises_fails_and_does_not_end_the_others(
    child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Check:
        raise ZeroDivisionError("of the test")

    child("say(Ended())")
    monkeypatch.setattr(host, "ray_check", fails)
    diagnosis = examine.examine("m", (), "cpu", lambda text: None)
    assert [check.finding for check in diagnosis.failed] == ["ZeroDivisionError: of the test"]
    assert [check.name for check in diagnosis.checks[:2]] == ["versions", "temporary files"]


def test_kernels_are_not_compared_with_the_rates_of_another_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = RatesReport(1.0, 2.0, 3.0, {"float32": 4.0})
    gpu, cpu = (DeviceReport(kind, "n", 2, 1, 1, kind.upper()) for kind in ("cuda", "cpu"))
    series = (
        Series("triton", device=gpu, rates=rates),
        Series("native", device=cpu),  # whose rates could not be measured
        Series("avx2"),
    )
    given: list[RatesReport | None] = []
    monkeypatch.setattr(examine, "_all_series", lambda *_: iter(series))
    monkeypatch.setattr(examine, "checks_of", lambda *_: ())

    def kernels_of(_: Series, rates: RatesReport | None) -> list[KernelCheck]:
        given.append(rates)
        return []

    monkeypatch.setattr(examine, "kernels_of", kernels_of)
    examine.examine("m", ("m",), "auto", lambda text: None)
    assert given == [rates, None, None]


@needs_library
def test_kernels_of_a_dtype_without_native_kernels_are_those_of_torch() -> None:
    import torch

    from getp.analysis.doctor.kernels import backend_name
    from model.ops.cpu.backend import CpuBackend

    cpu = torch.device("cpu")
    assert backend_name(CpuBackend(cpu, torch.float32)) == "torch"
    assert backend_name(CpuBackend(cpu, torch.bfloat16)) == bindings.kernels.level


def test_reports_survive_the_way_from_the_child() -> None:
    examples: list[Report] = [
        Started(3, "linear: a", "m"), Failed("speed", "x"),
        DeviceReport("cpu", "n", 2, 1, 1, "CPU", notices=("a", "b")),
        LibraryReport("amx", ("none", "amx")), RatesReport(1.0, 2.0, 3.0, {"float32": 4.0}),
        KernelReport("amx", "m", "linear", "a", "bfloat16", "p", None, 1, 2),
        ScoreReport("amx", 1, 2, 3.0, True, False, ("n",)),
    ]  # fmt: skip
    for report in examples:
        assert reports.read(reports.write(report)) == report
    assert reports.read("a warning of a library") is None
    request = Request("cuda", ("a", "b"), "amx", False, 7)
    assert Request.read(request.write()) == request
