import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import SamplingParams
from getp.errors import SOME_FAILED, GetpError, Interrupted
from getp.job import run as job_run
from getp.job.request_reader import RequestDefaults
from getp.job.run import Job
from getp.report.efficiency import RunEfficiency
from getp.report.measurements import quantile
from getp.text.answer_text import AnswerOptions
from getp.text.prompts import request_seed
from tests.getp.helpers import FakeEngine, fake_engine, small_tokenizer, write_tokenizer
from tokenizer import TemplateError, Tokenizer

TOKENIZER = small_tokenizer()
FINAL_LINE = r"elapsed time\(s\): \d+\.\d{6}, achieved throughput TPS \(tok/s\): \d+\.\d{6}"


def job(tmp_path: Path, data: bytes, **changes: Any) -> Job:
    (tmp_path / "input.txt").write_bytes(data)
    given: dict[str, Any] = {
        "input": str(tmp_path / "input.txt"),
        "output": str(tmp_path / "output.txt"),
        "checkpoint": "small",
    }
    defaults: dict[str, Any] = {
        "params": SamplingParams(max_positions=1024, stop_ids=TOKENIZER.stop_ids),
    }
    for name in ("params", "system"):
        if name in changes:
            defaults[name] = changes.pop(name)
    texts = {name: changes.pop(name) for name in ("stops", "chat") if name in changes}
    defaults["answer"] = AnswerOptions(**texts)
    return Job(**{**given, **changes}, defaults=RequestDefaults(**defaults))


def run(job: Job, engine: Any = None) -> int:
    engine = engine or fake_engine()
    return job_run.run_job(job, job_run.read(job), TOKENIZER, engine)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def errors(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{job.output}.errors.jsonl").open()]


def test_tokens_are_written_in_input_order_regardless_of_completion_order(tmp_path: Path) -> None:
    texts = [f"prompt {n}" for n in range(11)]
    work = job(tmp_path, "\n".join(["11", *texts]).encode())
    assert run(work) == 0
    rows = Path(work.output).read_text().splitlines()
    assert rows == [" ".join(map(str, ids(text))) for text in texts]


def test_last_line_of_standard_output_has_the_form_for_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(job(tmp_path, b"2\nab\ncd\n"))
    out, err = capsys.readouterr()
    assert re.fullmatch(FINAL_LINE + "\n", out)
    assert "output tok/s" in err


def test_standard_output_holds_only_tokens_if_it_is_the_output(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert run(job(tmp_path, b"2\nab\n\n", output="-")) == SOME_FAILED
    out, err = capfdbinary.readouterr()
    assert out == " ".join(map(str, ids("ab"))).encode() + b"\n\n"
    assert b"line 3 failed: the prompt is empty" in err
    assert re.search(FINAL_LINE.encode(), err)


def test_failed_requests_do_not_affect_the_others(tmp_path: Path) -> None:
    long = "x" * 50
    data = b"5\nfirst\n\n\xff\n" + long.encode() + b"\nlast\n"
    work = job(tmp_path, data, params=SamplingParams(max_positions=30))
    assert run(work) == SOME_FAILED
    rows = Path(work.output).read_text().split("\n")
    assert [bool(row) for row in rows] == [True, False, False, False, True, False]
    assert [(e["line"], e["index"], e["code"]) for e in errors(work)] == [
        (3, 1, "empty_prompt"),
        (4, 2, "invalid_utf8"),
        (5, 3, "request_error"),
    ]
    assert errors(work)[2]["message"] == "the prompt is too long"


def test_much_too_long_prompts_are_refused_before_they_are_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode = Tokenizer.encode

    def counted(self: Tokenizer, text: str, special: bool = True) -> list[int]:
        encoded.append(len(text))
        return encode(self, text, special)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    long = b"a" * (3 << 20)
    work = job(tmp_path, b"2\n" + long + b"\nab\n", params=SamplingParams(max_positions=1024))
    for chat in (False, True):
        changed = replace(
            work, defaults=replace(work.defaults, answer=AnswerOptions(chat=chat)), restart=True
        )
        assert run(changed) == SOME_FAILED
        (error,) = errors(work)
        assert error["code"] == "prompt_too_long"
        assert "has 31457" in error["message"]
        assert "no room for output within the limit of 1024 tokens" in error["message"]
    assert max(encoded) < 100


@pytest.mark.parametrize("name", ["output.txt", "output.txt.errors.jsonl", "output.txt.journal"])
def test_report_must_not_overwrite_another_file_of_the_job(tmp_path: Path, name: str) -> None:
    with pytest.raises(GetpError, match=f"report and .* are the same file: .*{name}"):
        job_run.read(job(tmp_path, b"1\nab\n", report=str(tmp_path / name)))


def test_errors_file_of_an_earlier_run_is_removed(tmp_path: Path) -> None:
    bad = job(tmp_path, b"1\n\n")
    assert run(bad) == SOME_FAILED
    assert errors(bad)
    assert run(job(tmp_path, b"1\ngood\n")) == 0
    assert not Path(f"{bad.output}.errors.jsonl").exists()


def test_job_without_requests_succeeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = job(tmp_path, b"0\n")
    assert run(work) == 0
    assert Path(work.output).read_bytes() == b""
    assert capsys.readouterr().out.endswith("(tok/s): 0.000000\n")


def test_stop_tokens_are_written_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (eos,) = TOKENIZER.stop_ids
    work = job(tmp_path, b"1\nab\n", report=str(tmp_path / "report.json"))
    run(work, fake_engine(lambda prompt: [*ids("cd"), eos, *ids("never")]))
    assert Path(work.output).read_text().split() == [*map(str, ids("cd")), str(eos)]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["output_tokens"] == len(ids("cd")) + 1


def test_stop_string_ends_a_request_at_the_token_that_completes_it(tmp_path: Path) -> None:
    work = job(tmp_path, b"1\nab\n", stops=("o W", "never"))
    generated = ids("hello World again")
    run(work, fake_engine(lambda prompt: generated))
    row = [int(word) for word in Path(work.output).read_text().split()]
    assert row == generated[: len(row)]
    assert "o W" in TOKENIZER.decode(row)
    assert "o W" not in TOKENIZER.decode(row[:-1])


def test_chat_template_is_applied_to_prompts(tmp_path: Path) -> None:
    engine = FakeEngine()
    run(job(tmp_path, b"1\nhi\n", chat=True, system="be kind"), engine)
    expected = (
        "<|start|>system<|message|>be kind<|end|>"
        "<|start|>user<|message|>hi<|end|><|start|>assistant"
    )
    assert TOKENIZER.decode(engine.requests[0].prompt_ids, skip_special=False) == expected


def test_equal_prompts_get_different_seeds_that_the_next_run_repeats(tmp_path: Path) -> None:
    seeds = []
    for _ in range(2):
        engine = FakeEngine()
        run(job(tmp_path, b"3\na\na\na\n", params=SamplingParams(seed=5)), engine)
        seeds.append({r.request_id: r.params.seed for r in engine.requests})
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0].values())) == 3


def test_seeds_of_different_jobs_do_not_collide() -> None:
    seeds = {request_seed(seed, index) for seed in range(50) for index in range(50)}
    assert len(seeds) == 2500
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)


def test_report_sums_up_the_requests(tmp_path: Path) -> None:
    work = job(tmp_path, b"3\nab\n\ncd\n", report=str(tmp_path / "report.json"))
    run(work)
    report = json.loads((tmp_path / "report.json").read_text())
    count = len(ids("ab")) + len(ids("cd"))
    assert report["requests_done"] == 2
    assert report["requests_failed"] == 1
    assert report["requests_cut"] == 2
    assert report["prompt_tokens"] == report["output_tokens"] == count
    assert report["cached_tokens"] == 4
    assert report["prefix_hit_rate"] == pytest.approx(4 / count)
    assert report["ttft_median_s"] == report["ttft_p99_s"] == 0.5
    assert report["per_token_median_s"] == pytest.approx(0.5 / (len(ids("ab")) - 1))
    assert report["output_tok_s"] == pytest.approx(count / report["inference_s"])
    assert report["mean_batch"] == 2.0
    assert report["peak_kv_use"] == 0.25
    assert report["peak_memory_bytes"] > 2**20
    assert report["dtype"] == "float32"
    assert set(report["versions"]) == {"getp", "python", "torch"}


def test_peak_memory_of_the_report_excludes_measuring_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = 2**28

    def run_efficiency(*args: object) -> RunEfficiency:
        nonlocal peak
        peak = 2**29
        return RunEfficiency()

    monkeypatch.setattr("getp.report.job_report.run_efficiency", run_efficiency)
    monkeypatch.setattr("tests.getp.helpers.peak_resident_bytes", lambda: peak)
    run(job(tmp_path, b"1\nab\n", report=str(tmp_path / "report.json")))
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["peak_memory_bytes"], peak) == (2**28, 2**29)


def test_job_succeeds_without_memory_to_measure_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*args: object) -> RunEfficiency:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr("getp.report.efficiency.peaks_of", no_memory)
    assert run(job(tmp_path, b"1\nab\n", report=str(tmp_path / "report.json"))) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["requests_done"] == 1
    assert report["limit_share"] is None
    assert "not enough free memory to measure the peak speed" in capsys.readouterr().err


def test_report_on_standard_output_is_only_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(job(tmp_path, b"1\nab\n", report="-"))
    captured = capfd.readouterr()
    assert json.loads(captured.out)["requests_done"] == 1
    assert re.fullmatch(FINAL_LINE, captured.err.splitlines()[-1])


def test_report_splits_the_warm_up_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    engine.stats.load_s, engine.stats.compile_s = 1.5, 2.25
    run(job(tmp_path, b"1\nab\n", report=str(tmp_path / "report.json"), details=True), engine)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["load_s"], report["compile_s"], report["capture_s"]) == (1.5, 2.25, 0.0)
    assert "load 1.50 s, compile 2.25 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, None), ([3.0], 0.99, 3.0), ([3.0, 1.0, 2.0], 0.5, 2.0), (range(100), 0.99, 98)],
)
def test_quantile_is_the_smallest_value_that_covers_the_share(
    values: Sequence[float], share: float, expected: float | None
) -> None:
    assert quantile(values, share) == expected


def test_ctrl_c_reports_the_requests_done_and_frees_the_engine(tmp_path: Path) -> None:
    calls = 0

    def answer(prompt: Sequence[int]) -> Sequence[int]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return prompt

    work, engine = job(tmp_path, b"5\na\nb\nc\nd\ne\n"), FakeEngine(answer)
    with pytest.raises(
        Interrupted, match=r"2 of 5 requests are done and saved in .*output.txt.journal"
    ):
        run(work, engine)
    assert not engine.warm
    assert not Path(work.output).exists()


def test_missing_chat_template_ends_the_job_before_the_model_loads(tmp_path: Path) -> None:
    work, engine = job(tmp_path, b"1\na\n", chat=True), FakeEngine()
    with pytest.raises(GetpError, match="no chat template"):
        job_run.run_job(work, job_run.read(work), small_tokenizer(None), engine)
    assert engine.stats.steps == 0


def test_invalid_chat_template_ends_the_job_before_the_model_loads(tmp_path: Path) -> None:
    work, engine = job(tmp_path, b"1\na\n", chat=True), FakeEngine()
    with pytest.raises(TemplateError, match=r"is not valid: .*endfor"):
        job_run.run_job(work, job_run.read(work), small_tokenizer("{% for x in y %}"), engine)
    assert engine.stats.steps == 0


def test_a_job_that_does_not_use_the_chat_template_runs_whatever_is_in_it(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model", "{% for x in y %}")
    work, engine = job(tmp_path, b"1\na\n"), FakeEngine()
    assert job_run.run_job(work, job_run.read(work), Tokenizer.load(folder), engine) == 0
    assert len(engine.requests) == 1


def test_an_input_without_requests_causes_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(job(tmp_path, b"0\n"))
    assert "input.txt has no requests" in capsys.readouterr().err


def test_lines_after_the_last_prompt_cause_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(job(tmp_path, b"1\na\nb\nc\n"))
    assert (
        "ignoring 2 extra lines after the 1 prompt announced on line 1" in capsys.readouterr().err
    )


@pytest.mark.parametrize("ignored", [0, 1, 2])
def test_report_names_the_lines_that_were_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ignored: int
) -> None:
    report = tmp_path / "report.json"
    run(job(tmp_path, b"1\na\n" + b"extra\n" * ignored, report=str(report)))
    assert json.loads(report.read_text())["requests_ignored"] == ignored
    table = " ".join(re.sub("[│\n]", " ", capsys.readouterr().err).split())
    shown = {0: ", 0 failed throughput", 1: "; 1 line after the", 2: "; 2 lines after the"}
    assert shown[ignored] in table


def test_files_that_will_be_replaced_are_named_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = str(tmp_path / "report.json")
    work = job(tmp_path, b"2\na\n\n", report=report)
    job_run.read(work)
    assert "will be replaced" not in capsys.readouterr().err
    (tmp_path / "output.txt.errors.jsonl").write_text("of the user\n")
    assert run(work) == SOME_FAILED
    assert "will be replaced" not in capsys.readouterr().err
    job_run.read(work)
    assert capsys.readouterr().err == (
        f"getp: {work.output}, {work.output}.errors-2.jsonl, {report} exist: they will be "
        "replaced when the job is done\n"
    )
    job_run.read(replace(work, report=None, output=str(tmp_path / "input.jsonl")))
    assert "will be replaced" not in capsys.readouterr().err
    (tmp_path / "input.jsonl").touch()
    job_run.read(replace(work, report=None, output=str(tmp_path / "input.jsonl")))
    assert "input.jsonl exists: it will be replaced" in capsys.readouterr().err
    job_run.read(replace(work, report=None, output="/dev/null"))
    assert "will be replaced" not in capsys.readouterr().err


def test_progress_is_logged_line_by_line_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("getp.job.progress._LINE_INTERVAL_S", 0.02)

    def slow(prompt: Sequence[int]) -> Sequence[int]:
        time.sleep(0.05)
        return prompt

    run(job(tmp_path, b"3\na\nb\nc\n"), fake_engine(slow))
    lines = capsys.readouterr().err.splitlines()
    form = r"[0-3] of 3 requests, \d+ tok/s(, about \d+ s left)?"
    assert len([line for line in lines if re.fullmatch(form, line)]) >= 2


def test_results_are_compared_with_a_reference(tmp_path: Path) -> None:
    data = b"3\nab\ncd\nef\n"
    first = job(tmp_path, data)
    assert run(first) == 0
    reference = tmp_path / "reference.txt"
    lines = Path(first.output).read_text().splitlines()
    reference.write_text("\n".join([lines[0], "1 2", lines[2], ""]))
    report = str(tmp_path / "report.json")
    given: dict[str, Any] = {"reference": str(reference), "report": report}
    assert run(job(tmp_path, data, required_agreement=0.6, **given)) == 0
    agreement = json.loads(Path(report).read_text())["agreement"]
    assert (agreement["lines_equal"], agreement["lines"]) == (2, 3)
    assert agreement["first_difference"]["line"] == 2
    with pytest.raises(GetpError, match="2 of 3 answers equal"):
        run(job(tmp_path, data, required_agreement=0.9, **given))
    for output in ("out.csv", "-"):  # before the job runs
        with pytest.raises(GetpError, match="compares a file of token ids or JSONL"):
            run(replace(job(tmp_path, data, **given), output=output))
    with pytest.raises(GetpError, match=r"reference\.txt has 3 answers, but .* has 2 requests"):
        run(job(tmp_path, b"2\nab\ncd\n", **given))


def test_report_may_be_a_page_with_all_figures(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    texts = "\n".join(f"prompt {n}" for n in range(11))
    assert run(job(tmp_path, f"11\n{texts}".encode(), report=str(page), price=3.6)) == 0
    text = page.read_text()
    data = re.search(r'<script type="application/json" id="report">(.*)</script>', text)
    assert data is not None
    report = json.loads(data[1].replace("<\\/", "</"))
    assert report["requests_done"] == 11
    seconds = report["warm_up_s"] + report["inference_s"] + report["finish_s"]
    assert report["cost"] == pytest.approx(3.6 / 3600 * seconds)
    assert text.count("<svg") >= 2  # the latencies; the course needs a longer job
    without_names = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", without_names)
    assert "http" not in without_names  # the page needs no other file
