"""Tests of benchmarks/gpu.py that do not need a GPU."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_loads, gpu_times
from engine import Engine, EngineConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_prints_one_line_and_exits_with_2() -> None:
    result = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


def test_the_nano_vllm_load_equals_the_published_one() -> None:
    prompts, outputs = gpu_loads.nano_load()
    assert len(prompts) == len(outputs) == 256
    assert sum(outputs) == 133_966
    assert {100 <= len(prompt) <= 1024 for prompt in prompts} == {True}


def test_other_loads_have_the_specified_lengths() -> None:
    prompts, outputs = gpu_loads.short_load(50, 1024)
    assert {len(p) + n for p, n in zip(prompts, outputs, strict=True)} == {1024}
    prompts, outputs = gpu_loads.context_load(2, 1000, 400)
    assert [len(p) for p in prompts] == [800, 800]
    assert outputs == [400, 400]
    prompts, outputs = gpu_loads.ragged_load(500)
    assert {50 <= len(prompt) <= 300 for prompt in prompts} == {True}
    assert {20 <= count <= 300 for count in outputs} == {True}


def run_loads_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loads run a tiny model on the CPU."""
    config = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10_001}
    monkeypatch.setitem(
        gpu_loads.KNOWN_CONFIGS, "qwen2-0.5b", gpu_loads.KNOWN_CONFIGS["qwen2-0.5b"] | config
    )

    def engine(folder: Path, config: EngineConfig, **given: Any) -> Engine:
        assert config.device == "cuda"
        return Engine(folder, replace(config, device="cpu", kv_memory=32 << 20), **given)

    monkeypatch.setattr(gpu_loads, "Engine", engine)
    monkeypatch.setattr(gpu_loads, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_a_load_is_timed_and_stops_at_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It also stops when no request has completed: requests of equal length end together."""
    pytest.importorskip("triton")
    run_loads_on_the_cpu(monkeypatch)
    limits, load = gpu_times.Limits(1e11, 1e12), gpu_loads.short_load(8, 60)
    rows = list(gpu_loads.time_load("qwen2-0.5b", load, limits, 60, batch_size=4))
    assert rows[2].name == "qwen2-0.5b, 8 requests"
    assert rows[2].value > 0
    load = gpu_loads.context_load(1, 30, 20)
    names = [row.name for row in gpu_loads.time_load("qwen2-0.5b", load, limits, 60)]
    assert "qwen2-0.5b: kernels per layer" in names
    load = gpu_loads.short_load(8, 4000)
    rows = list(gpu_loads.time_load("qwen2-0.5b", load, limits, 0.5, batch_size=4))
    assert rows[2].name == "qwen2-0.5b, 8 requests (0 done)"


def test_a_load_with_a_failed_request_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run_loads_on_the_cpu(monkeypatch)
    prompts, outputs = gpu_loads.context_load(2, 30, 20)
    load = [prompts[0], [10_001]], outputs
    times = gpu_loads.time_load("qwen2-0.5b", load, gpu_times.Limits(1e11, 1e12), 60)
    with pytest.raises(RuntimeError, match="failed: the prompt has token ids"):
        list(times)


def test_the_time_of_overlapping_kernels_is_counted_once() -> None:
    spans = [(5.0, 9.0), (0.0, 4.0), (1.0, 2.0), (3.0, 6.0), (20.0, 21.0)]
    events = [SimpleNamespace(time_range=SimpleNamespace(start=a, end=b)) for a, b in spans]
    assert gpu_loads.union_us(events) == 10.0
    assert gpu_loads.union_us([]) == 0.0


def run_all(
    outcomes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: Path | None = None,
) -> tuple[int, dict[str, Any]]:
    def section(name: str, limits: dict[str, float], limit_s: float) -> Any:
        assert limit_s <= gpu.SECTIONS[name].limit_s
        return outcomes.get(name, ([], None))

    monkeypatch.setattr(gpu, "start_section", section)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    status = gpu.run_all(tuple(gpu.SECTIONS), time.monotonic() + 570, file)
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_failing_section_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"name": "decode", "value": 2.0, "unit": "TB/s", "share": 0.5, "of": "copy"}
    outcomes = {"check-norms": ([], "went wrong"), "attention": ([row], None)}
    status, results = run_all(outcomes, monkeypatch, capsys)
    assert status == 1
    assert results["sections"]["check-norms"]["problem"] == "went wrong"
    assert results["sections"]["attention"]["rows"] == [row]
    assert set(results["sections"]) == set(gpu.SECTIONS)


def test_the_status_is_0_if_no_section_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_all({}, monkeypatch, capsys)[0] == 0


def test_results_are_printed_and_saved_after_each_section(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A run that is killed loses only the section that was running."""
    file, seen = tmp_path / "results.json", list[int]()

    def section(name: str, limits: dict[str, float], limit_s: float) -> Any:
        if name != "limits":
            seen.append(len(json.loads(file.read_text())["sections"]))
        return [{"name": f"of {name}", "value": 1.0, "unit": "s", "share": None, "of": ""}], None

    monkeypatch.setattr(gpu, "start_section", section)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert gpu.run_all(("check-norms", "nano"), time.monotonic() + 570, file) == 0
    assert seen == [1, 2]
    *shown, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == json.loads(file.read_text())
    assert all(f"of {name}" in "".join(shown) for name in ("limits", "check-norms", "nano"))


def test_a_check_reports_every_problem_with_its_comparison_and_dtype(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def comparisons(dtype: torch.dtype) -> Iterator[gpu_checks.Comparison]:
        ones = torch.ones(3, dtype=dtype)
        yield "first", ones * 2, ones
        yield "second", ones, ones
        if dtype == torch.bfloat16:
            raise RuntimeError("no kernel image")
        is_nan = torch.are_deterministic_algorithms_enabled()
        yield "third", torch.empty(3) if is_nan else ones, ones
        yield "fourth", ones * 0, ones * 0

    check = partial(gpu_checks.compare, comparisons)
    monkeypatch.setattr(gpu_checks, "check_norms", check)
    rows = gpu.SECTIONS["check-norms"].run(gpu_times.Limits(1.0, 1.0))
    assert next(rows).name == "check of norms"
    with pytest.raises(gpu_checks.CheckError) as caught:
        next(rows)
    assert str(caught.value).split("; ") == [
        "first, torch.bfloat16: error 1.0e+00 of the largest value",
        "torch.bfloat16, after second: RuntimeError: no kernel image",
        "first, torch.bfloat16: error 1.0e+00 of the largest value",
        "torch.bfloat16, after second: RuntimeError: no kernel image",
        "first, torch.float32: error 1.0e+00 of the largest value",
        "fourth, torch.float32: all expected values are zero",
        "first, torch.float32: error 1.0e+00 of the largest value",
        "third, torch.float32: error nan of the largest value",
        "fourth, torch.float32: all expected values are zero",
    ]
    assert capsys.readouterr().err.splitlines()[-1] == "fourth, torch.float32"
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_hanging_section_is_stopped_and_a_failing_one_reports_the_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "section.py"
    monkeypatch.setattr(gpu, "__file__", str(script))
    row = gpu.RESULT_PREFIX + json.dumps({"name": "first"})
    script.write_text(f"import time\nprint({row!r}, flush=True)\ntime.sleep(60)")
    rows, problem = gpu.start_section("nano", {}, 2)
    assert rows == [{"name": "first"}]
    assert problem == "stopped after 2 s"
    script.write_text("raise ValueError('the reason')")
    assert gpu.start_section("nano", {}, 30) == ([], "status 1: ValueError: the reason")


def test_processes_that_a_section_leaves_running_are_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script, pid = tmp_path / "section.py", tmp_path / "pid"
    monkeypatch.setattr(gpu, "__file__", str(script))
    script.write_text(
        "import pathlib, subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))"
    )
    start = time.monotonic()
    assert gpu.start_section("nano", {}, 30) == ([], None)
    assert time.monotonic() - start < 30
    state = Path(f"/proc/{pid.read_text()}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() - start < 30
        time.sleep(0.01)


def test_the_time_limits_of_all_sections_fit_the_budget() -> None:
    peers = ("transformers", "vllm")
    ours = [section for name, section in gpu.SECTIONS.items() if name not in peers]
    longest = max(section.limit_s for section in ours if not section.timed)
    timed = sum(section.limit_s for section in ours if section.timed)
    assert longest + timed <= gpu.BUDGET_S < 600
    names = ("norms", "attention", "experts", "sampling", "fusions")
    checks = [*(f"check-{name}" for name in names), "parity-dense", "parity-experts", "score"]
    assert list(gpu.SECTIONS)[: 1 + len(checks)] == ["limits", *checks]
    assert [name for name, section in gpu.SECTIONS.items() if not section.timed] == checks
    assert tuple(gpu.SECTIONS)[-2:] == peers


@pytest.mark.skipif(find_spec("nvidia") is not None, reason="torch is built for CUDA")
def test_the_null_gpu_names_its_missing_requirements() -> None:
    result = subprocess.run(
        [sys.executable, "benchmarks/null_gpu.py", "benchmarks/gpu.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "null_gpu.py needs a C compiler, and torch for CUDA 13 with its Triton"
    ]
