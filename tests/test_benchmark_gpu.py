"""Tests of benchmarks/gpu.py that do not need a GPU."""

import inspect
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_sections import (
    checks,
    loads,
    model_checks,
    processes,
    profiles,
    results,
    variants,
)
from benchmarks.gpu_sections.measure import Limits
from benchmarks.gpu_sections.model_checks import CheckError
from benchmarks.gpu_sections.processes import Outcome
from benchmarks.gpu_sections.sections import (
    FULL,
    FULL_BUDGET_S,
    PARITY_PARTS,
    QUICK,
    QUICK_BUDGET_S,
    SECTIONS,
    Section,
)
from engine import Engine, EngineConfig
from model.checks import OPERATIONS, Case
from model.ops.backend import Backend

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
    prompts, outputs = loads.nano_load()
    assert len(prompts) == len(outputs) == 256
    assert sum(outputs) == 133_966
    assert {100 <= len(prompt) <= 1024 for prompt in prompts} == {True}


def test_other_loads_have_the_specified_lengths() -> None:
    prompts, outputs = loads.equal_load(50, 14, 991)
    assert {len(prompt) for prompt in prompts} == {14}
    assert outputs == [991] * 50
    prompts, outputs = loads.ragged_load(500)
    assert {50 <= len(prompt) <= 300 for prompt in prompts} == {True}
    assert {20 <= count <= 300 for count in outputs} == {True}


def test_a_load_in_progress_has_requests_at_all_positions() -> None:
    whole = loads.equal_load(10, 14, 100)
    prompts, outputs = loads.in_progress(whole, 4)
    assert [len(prompt) for prompt in prompts[:4]] == [14, 39, 64, 89]
    assert outputs[:4] == [100, 75, 50, 25]
    assert [prompt[:14] for prompt in prompts] == whole[0]
    assert (prompts[4:], outputs[4:]) == (whole[0][4:], whole[1][4:])


def run_loads_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loads run a tiny model on the CPU."""
    config = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10_001}
    monkeypatch.setitem(
        loads.KNOWN_CONFIGS, "qwen2-0.5b", loads.KNOWN_CONFIGS["qwen2-0.5b"] | config
    )

    def engine(folder: Path, config: EngineConfig, **given: Any) -> Engine:
        assert config.device == "cuda"
        return Engine(folder, replace(config, device="cpu", kv_memory=32 << 20), **given)

    monkeypatch.setattr(loads, "Engine", engine)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_a_load_is_timed_whole_and_in_its_steady_state(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    run_loads_on_the_cpu(monkeypatch)
    limits, load = Limits(1e11, 1e12), loads.equal_load(12, 5, 300)
    rows = list(loads.time_load("qwen2-0.5b", "equal", load, limits, 60, 4, "7 (another)"))
    whole, steady = (row for row in rows if row.unit == "tok/s")
    assert whole.name == "equal, whole"
    assert steady.name.startswith("equal, steady state of ")
    assert ", 4 running, " in steady.name
    assert steady.name.endswith("12 of 12 requests finished")
    assert whole.value > 0
    assert steady.value > 0
    assert {whole.published, steady.published} == {"7 (another)"}
    load = loads.equal_load(1, 20, 20)
    names = [row.name for row in loads.time_load("qwen2-0.5b", "one", load, limits, 60)]
    assert "qwen2-0.5b: kernels per layer" in names


def test_a_part_of_a_load_has_the_mean_context_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stops at its time limit, and when no request has completed as well."""
    pytest.importorskip("triton")
    run_loads_on_the_cpu(monkeypatch)
    load = loads.in_progress(loads.equal_load(400, 10, 400), 8)
    rows = list(loads.time_load("qwen2-0.5b", "part", load, Limits(1e11, 1e12), 0.5, 8))
    (steady,) = (row for row in rows if row.unit == "tok/s")
    found = re.search(r"mean context (\d+), (\d+) of 400 requests finished", steady.name)
    assert found is not None
    assert abs(int(found[1]) - 210) < 40
    assert int(found[2]) < 400
    load = loads.equal_load(4, 10, 4000)
    rows = list(loads.time_load("qwen2-0.5b", "long", load, Limits(1e11, 1e12), 0.3, 4))
    assert "0 of 4 requests finished" in next(row.name for row in rows if row.unit == "tok/s")


def test_a_load_stops_before_its_section_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    run_loads_on_the_cpu(monkeypatch)
    limits = Limits(1e11, 1e12, until=time.time())
    load = loads.equal_load(4, 10, 4000)
    names = [row.name for row in loads.time_load("qwen2-0.5b", "late", load, limits, 60, 4)]
    assert "late: stopped before the first 4 prompts were computed" in names


def test_a_load_with_a_failed_request_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run_loads_on_the_cpu(monkeypatch)
    prompts, outputs = loads.equal_load(2, 30, 20)
    load = [prompts[0], [10_001]], outputs
    times = loads.time_load("qwen2-0.5b", "wrong", load, Limits(1e11, 1e12), 60)
    with pytest.raises(RuntimeError, match="failed: the prompt has token ids"):
        list(times)


def test_the_time_of_overlapping_kernels_is_counted_once() -> None:
    spans = [(5.0, 9.0), (0.0, 4.0), (1.0, 2.0), (3.0, 6.0), (20.0, 21.0)]
    events = [SimpleNamespace(time_range=SimpleNamespace(start=a, end=b)) for a, b in spans]
    assert profiles.union_us(events) == 10.0
    assert profiles.union_us([]) == 0.0


Start = Callable[[Outcome], None]


def run_all(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    file: Path | None = None,
    names: Any = tuple(QUICK),
) -> int:
    """Run sections that `start` fills instead of a process."""

    def section(
        outcome: Outcome, limits: dict[str, float], limit_s: float, saved: Callable[[], None]
    ) -> None:
        assert limit_s <= max(SECTIONS[outcome.name].limit_s, gpu.VARIANTS_LIMIT_S)
        start(outcome)
        saved()

    monkeypatch.setattr(gpu, "start_section", section)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return gpu.run_all(tuple(names), time.monotonic() + 570, file)


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON object of the last line; keeps the other lines out of the output."""
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def row(name: str, unit: str = "s") -> dict[str, Any]:
    return {"name": name, "value": 2.0, "unit": unit, "share": 0.5, "of": "copy", "published": ""}


def test_a_failing_section_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(outcome: Outcome) -> None:
        if outcome.name == "quick-nano":
            outcome.problem = "went wrong"
        else:
            outcome.rows.append(row(outcome.name))

    assert run_all(start, monkeypatch) == 1
    sections = printed(capsys)["sections"]
    assert sections["quick-nano"]["problem"] == "went wrong"
    assert sections["quick-llama"]["rows"] == [row("quick-llama")]
    assert set(sections) == set(QUICK)


def test_the_status_is_0_if_no_section_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_all(lambda outcome: None, monkeypatch) == 0


@pytest.mark.parametrize(
    ("helping", "verdict"),
    [
        (
            ("without programmatic launch", "by torch"),
            "check-experts succeeds without programmatic launch, by torch",
        ),
        (("by torch",), "only torch helps: the kernel itself is at fault"),
        ((), "no variant helps, not even torch: look at the check, torch and the GPU"),
    ],
)
def test_a_failed_check_is_repeated_with_variants_that_may_help(
    helping: tuple[str, ...],
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tried = list[str]()

    def start(outcome: Outcome) -> None:
        if outcome.variant:
            tried.append(outcome.variant)
        if outcome.name == "check-experts" and outcome.variant not in helping:
            outcome.problem = "one value differs"

    names = ("check-norms", "check-experts", "quick-nano")
    assert run_all(start, monkeypatch, names=names) == 1
    assert sorted(tried) == sorted(variants.VARIANTS)
    sections = printed(capsys)["sections"]
    assert sections["check-experts"]["problem"] == "one value differs"
    rows = [row["name"] for row in sections["variants of check-experts"]["rows"]]
    assert rows[-1] == verdict
    assert len(rows) == len(variants.VARIANTS) + 1
    assert "variants of check-norms" not in sections


def test_variants_of_checks_that_ran_out_of_time_are_tried_after_the_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = list[str]()

    def start(outcome: Outcome) -> None:
        tried.append(outcome.name)
        if outcome.name.startswith("check-"):
            problems = {"check-norms": "stopped after 30 s: a norm", "check-experts": "differs"}
            outcome.problem = problems[outcome.name]

    assert run_all(start, monkeypatch, names=("check-norms", "check-experts", "quick-nano")) == 1
    variants_of = {name: tried[3:].index(name) for name in ("check-norms", "check-experts")}
    assert variants_of["check-experts"] < tried[3:].index("quick-nano") < variants_of["check-norms"]


def test_only_notices_of_the_gpu_are_problems_of_a_parity_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("transformers")
    noticed = ["cpu"]

    @contextmanager
    def engine(path: Path, config: EngineConfig, notice: Callable[[str], None], **_: Any) -> Any:
        if config.device in noticed:
            notice("weights become dense")
        yield SimpleNamespace(generate=lambda requests: [])

    monkeypatch.setattr(model_checks, "Engine", engine)
    monkeypatch.setattr(model_checks, "COMPUTES", True)
    assert list(model_checks._parity(["mxfp4"])) == [None, None]
    noticed.append("cuda")
    assert list(model_checks._parity(["mxfp4"])) == ["mxfp4: CheckError: weights become dense"]


def test_every_family_is_in_one_part_of_the_parity_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tests.checkpoints import FAMILIES

    monkeypatch.setattr(model_checks, "_parity", list)
    parts = [model_checks.check_parity_others(i + 1) for i in range(PARITY_PARTS)]
    names = [str(name) for part in parts for name in part]
    quick = {*model_checks.QUICK_DENSE, *model_checks.QUICK_EXPERTS} - {"mxfp4"}
    assert sorted([*names, *quick]) == sorted(FAMILIES)
    assert sum(name.startswith("parity-others") for name in FULL) == PARITY_PARTS


def test_variants_change_the_kernels_of_new_backends_only_in_their_context() -> None:
    pytest.importorskip("triton")
    from model.ops.backend import Backend
    from model.ops.triton.backend import TritonBackend
    from model.ops.triton.tiles import TILES

    before = TILES["sm_90"]
    assert before.programmatic_launch
    with variants.changed_kernels(variants.WITHOUT_OVERLAP):
        assert TILES["sm_90"] == replace(before, programmatic_launch=False)
    with variants.changed_kernels("with one stage"):
        assert TILES["sm_90"].decode == replace(before.decode, stages=1)
        assert {tile.stages for tile in TILES["sm_90"].experts} == {1}
    with variants.changed_kernels("with small tiles"):
        assert TILES["sm_90"].prefill.m < before.prefill.m
        assert TILES["sm_90"].programmatic_launch
    with variants.changed_kernels(variants.BY_TORCH, ("route", "experts")):
        assert TritonBackend.experts is Backend.experts
        assert TritonBackend.attention is not Backend.attention
    assert TILES["sm_90"] is before
    assert TritonBackend.experts is not Backend.experts


def test_rows_are_saved_as_they_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that is killed loses nothing."""
    file, seen = tmp_path / "results.json", list[Any]()

    def section(
        outcome: Outcome, limits: dict[str, float], limit_s: float, saved: Callable[[], None]
    ) -> None:
        for number in range(2):
            outcome.rows.append(row(f"{outcome.name} {number}"))
            saved()
            seen.append(json.loads(file.read_text())["sections"][outcome.name]["rows"])

    monkeypatch.setattr(gpu, "start_section", section)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert gpu.run_all(("quick-nano",), time.monotonic() + 570, file) == 0
    assert [len(rows) for rows in seen] == [1, 2, 1, 2]
    assert seen[-1][-1] == row("quick-nano 1")


def test_an_interrupted_run_continues_with_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, started = tmp_path / "results.json", list[str]()

    def fail(outcome: Outcome) -> None:
        outcome.rows.append(row(outcome.name))
        if outcome.name == "quick-nano":
            outcome.problem = "stopped after 1 s"
        if outcome.name == "quick-llama":
            raise KeyboardInterrupt

    names = ("quick-nano", "quick-gpt-oss", "quick-llama", "quick-qwen2")
    with pytest.raises(KeyboardInterrupt):
        run_all(fail, monkeypatch, file, names)
    assert run_all(lambda outcome: started.append(outcome.name), monkeypatch, file, names) == 0
    assert started == ["quick-nano", "quick-llama", "quick-qwen2"]
    sections = printed(capsys)["sections"]
    assert sections["quick-gpt-oss"]["rows"] == [row("quick-gpt-oss")]
    assert sections["quick-nano"]["problem"] is None


def test_results_of_another_gpu_or_of_other_code_are_not_continued(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    run_all(lambda outcome: None, monkeypatch, file, ("quick-nano",))
    before = file.read_text()
    monkeypatch.setattr(results, "source_hash", lambda: "other")
    with pytest.raises(results.ResultsError, match="results of another source"):
        run_all(lambda outcome: None, monkeypatch, file, ("quick-nano",))
    assert file.read_text() == before
    file.write_text("no JSON")
    with pytest.raises(results.ResultsError, match="not a file of results"):
        run_all(lambda outcome: None, monkeypatch, file, ("quick-nano",))


def test_rates_are_printed_as_rows_of_the_table_in_the_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(outcome: Outcome) -> None:
        if outcome.name == "quick-nano":
            rate = row("a load", "tok/s") | {"value": 12_345.6, "published": "7 (another)"}
            outcome.rows += [rate, row("compiling")]

    run_all(start, monkeypatch, names=("quick-nano",))
    lines = capsys.readouterr().out.splitlines()
    assert "| a load | 12,346 | 50% of copy | 7 (another) |" in lines
    assert not any("| compiling" in line for line in lines)
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert results.TABLE_HEAD in text


def test_a_check_reports_every_problem_and_the_number_of_comparisons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "check_norms", lambda: iter(["first: wrong", None, "third: wrong"]))
    rows = QUICK["check-norms"].run(Limits(1.0, 1.0))
    found = next(rows)
    assert (found.name, found.value, found.unit) == ("check of norms", 1, "of 3 correct")
    with pytest.raises(CheckError, match="first: wrong; third: wrong"):
        next(rows)
    monkeypatch.setattr("benchmarks.gpu_sections.inputs.COMPUTES", False)
    assert next(QUICK["check-norms"].run(Limits(1.0, 1.0))).name == (
        "check of norms: 3 comparisons ran; results are not computed here"
    )


def test_tokens_that_depend_on_the_mode_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks share the GPU's memory, so no engine of a check may take all of it."""
    pytest.importorskip("triton")
    memory, runs = list[int | None](), itertools.count()

    @contextmanager
    def engine(name: str, batch_size: int, kv_memory: int | None = None) -> Iterator[Any]:
        memory.append(kv_memory)
        yield SimpleNamespace(runner=SimpleNamespace(uncapture=lambda: None))

    def tokens(*_: Any) -> dict[int, list[int]]:
        return {0: [next(runs) // 3]}  # the fourth run differs

    monkeypatch.setattr(model_checks, "dummy_engine", engine)
    monkeypatch.setattr(model_checks, "run_load", tokens)
    *same, last = model_checks.check_tokens()
    assert same == [None] * 3
    assert last is not None
    assert last.startswith("without programmatic launch: tokens ")
    assert len(memory) == 2
    assert None not in memory


def test_a_result_that_varies_is_a_problem() -> None:
    varying, fixed = itertools.count(), torch.ones(3)
    case = Case("op", "", lambda ops: lambda: (torch.full((3,), next(varying)),), 0, 0)
    assert checks.difference(case, Backend(torch.device("cpu"), torch.float32)) == (
        "10 of 10 repetitions differ"
    )
    case = Case("op", "", lambda ops: lambda: (fixed,), 0, 0)
    assert checks.difference(case, Backend(torch.device("cpu"), torch.float32)) is None


def start(script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit_s: float) -> Outcome:
    """The outcome of a section whose process runs this script."""
    file = tmp_path / "section.py"
    file.write_text(script)
    monkeypatch.setattr(processes, "SCRIPT", file)
    outcome = Outcome("quick-nano")
    processes.start_section(outcome, {}, limit_s, lambda: None)
    return outcome


def test_a_hanging_section_is_stopped_and_a_failing_one_reports_the_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = processes.RESULT_PREFIX + json.dumps({"name": "first"})
    script = f"import time\nprint({line!r}, flush=True)\ntime.sleep(60)"
    outcome = start(script, monkeypatch, tmp_path, 2)
    assert outcome.rows == [{"name": "first"}]
    assert outcome.problem == "stopped after 2 s"
    outcome = start("raise ValueError('the reason')", monkeypatch, tmp_path, 30)
    assert (outcome.rows, outcome.problem) == ([], "status 1: ValueError: the reason")


def test_rows_are_read_while_a_section_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = processes.RESULT_PREFIX + json.dumps({"name": "é"})
    script = f"import time\nfor _ in 'ab':\n    print({line!r}, flush=True)\n    time.sleep(0.8)"
    (tmp_path / "section.py").write_text(script)
    monkeypatch.setattr(processes, "SCRIPT", tmp_path / "section.py")
    outcome, counts = Outcome("quick-nano"), list[int]()
    processes.start_section(outcome, {}, 30, lambda: counts.append(len(outcome.rows)))
    assert counts == [1, 2]
    assert outcome.rows == [{"name": "é"}] * 2


def test_processes_that_a_section_leaves_running_are_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    script = (
        "import pathlib, subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))"
    )
    begin = time.monotonic()
    assert start(script, monkeypatch, tmp_path, 30).problem == ""
    assert time.monotonic() - begin < 30
    state = Path(f"/proc/{pid.read_text()}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() - begin < 30
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("sections", "budget", "most"), [(QUICK, QUICK_BUDGET_S, 90), (FULL, FULL_BUDGET_S, 480)]
)
def test_the_time_limits_of_all_sections_fit_the_budget(
    sections: dict[str, Section], budget: float, most: float
) -> None:
    counted = [section for name, section in sections.items() if name != "vllm"]
    longest = max(section.limit_s for section in counted if not section.timed)
    timed = sum(section.limit_s for section in counted if section.timed)
    assert longest + timed <= budget <= most
    assert next(iter(sections)) == "limits"
    together = [name for name, section in sections.items() if not section.timed]
    assert list(sections)[1 : 1 + len(together)] == together  # they run before what is timed


def test_no_section_starts_after_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "start_section", lambda *_: pytest.fail("started"))
    assert gpu.run_all(tuple(QUICK), time.monotonic() + 1) == 1


def test_the_functions_of_all_sections_exist() -> None:
    """They are imported only in the process of their section."""
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    for name, section in SECTIONS.items():
        given = inspect.getclosurevars(section.run).nonlocals
        module = given.get("module", "loads")
        function = given.get("function") or given["load"][0]
        found = import_module(f"benchmarks.gpu_sections.{module}")
        assert callable(getattr(found, function, None)), name


def test_a_sweep_ends_in_time_and_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu_sections import sweeps
    from model.ops.triton.tiles import Tile

    now = [0.0]

    def compile_together(calls: Any) -> None:
        now[0] += 4.0  # however many there are

    monkeypatch.setattr(sweeps, "compile_together", compile_together)
    monkeypatch.setattr(sweeps, "seconds_of", lambda call: call())
    monkeypatch.setattr(sweeps.time, "time", lambda: now[0])
    monkeypatch.setattr(sweeps.os, "cpu_count", lambda: 2)
    tiles = [Tile(16, 16 << i, 0, 1, 2) for i in range(8)]
    calls = {tile: (lambda i=i: 1.0 / (i + 1)) for i, tile in enumerate(tiles)}
    found = [(name, calls, tiles[0]) for name in "abc"]
    names = [row.name for row in sweeps.sweeps(found, 30.0)]
    # 10 s for each: the tile in use, then one group of two, after which a third would be too late.
    assert names[:3] == [f"a, {tile}" for tile in tiles[:3]]
    assert names[3:5] == [
        f"a: fastest {tiles[2]}",
        "a: 5 of 8 tiles were left out for lack of time",
    ]
    assert now[0] <= 30.0
    assert list(sweeps.sweeps(found[:1] * 3, now[0] + 5.0))[-1].name == (
        "a: left out for lack of time"
    )


def test_other_kernels_that_compile_for_long_are_left_out_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu_sections import anchors

    now = [0.0]

    def seconds_of(call: Any) -> float:
        now[0] += 4.0
        return 1.0

    monkeypatch.setattr(anchors, "rand", lambda *shape, dtype: torch.empty(shape, device="meta"))
    monkeypatch.setattr(anchors, "seconds_of", seconds_of)
    monkeypatch.setattr(anchors.time, "time", lambda: now[0])
    rows = list(anchors._attention(Limits(1.0, 1.0, 15.0), "Flex", lambda *_: print))
    assert [row.name.endswith("for lack of time") for row in rows] == [False] * 3 + [True] * 9
    assert rows[3].name == ("Flex: decode 16/8 heads of 128, 64 x 2000: left out for lack of time")


def test_a_sweep_leaves_out_tiles_that_do_not_fit_into_registers() -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu_sections.sweeps import _tiles
    from model.ops.triton.tiles import Tile

    own = Tile(128, 128, 64, 2, 4)  # stays, although it does not fit
    found = _tiles(own, (64, 128), (64, 128), (2, 4), 64)
    assert found[0] == own
    others = {(tile.m, tile.n, tile.warps) for tile in found[1:]}
    assert (128, 128, 4) in others
    assert (128, 64, 2) in others
    assert (128, 128, 2) not in others


def test_every_operation_with_a_check_can_be_replaced_by_torch() -> None:
    operations = {name for each in QUICK.values() for name in each.operations}
    assert set(OPERATIONS) <= operations
    assert all(hasattr(Backend, name) for name in operations)


def compile_one_step(folder: Path, *changes: str) -> str:
    """Compile the first step for an H200 in a new process; return what it prints."""
    pytest.importorskip("triton")
    code = [
        "import itertools, pathlib",
        "from dataclasses import replace",
        "from benchmarks.gpu_sections import triton_cache as cache",
        "calls = cache.calls",
        "cache.calls = lambda name: itertools.islice(calls(name), 1)",
        *changes,
        f"cache.compile_for('sm_90', pathlib.Path({str(folder)!r}))",
    ]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_kernels_are_compiled_without_a_gpu_into_a_folder_that_other_processes_use(
    tmp_path: Path,
) -> None:
    """A kernel is found again unless its source, arguments or options change."""
    first = compile_one_step(tmp_path)
    kernels = {path.parent.name for path in tmp_path.glob("*/*.cubin")}
    assert first.startswith(f"{len(kernels)} kernels for sm_90, ")
    names = {path.stem for path in tmp_path.glob("*/*.cubin")}
    assert {"decode_attention", "experts_gate_up", "experts_down", "choose_tokens"} <= names
    compile_one_step(tmp_path)
    assert {path.parent.name for path in tmp_path.glob("*/*.cubin")} == kernels
    assert {path.suffix for path in tmp_path.glob("*/*")} == {".cubin", ".json"}
    tiles = "cache.TILES['sm_90']"
    compile_one_step(tmp_path, f"{tiles} = replace({tiles}, decode=replace({tiles}.decode, n=16))")
    new = [path for path in tmp_path.glob("*/*.cubin") if path.parent.name not in kernels]
    assert {path.stem for path in new} == {"decode_attention"}


def test_compiled_kernels_are_found_in_a_folder_that_was_moved(tmp_path: Path) -> None:
    compile_one_step(tmp_path / "made")
    folder = (tmp_path / "made").rename(tmp_path / "moved")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.cubin")}
    compile_one_step(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*.cubin")} == before


def test_kernels_of_an_unknown_architecture_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--compile-for", "sm_12", str(tmp_path / "new")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("gpu.py: unknown architecture sm_12; known: sm_80, ")
    assert not (tmp_path / "new").exists()


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
