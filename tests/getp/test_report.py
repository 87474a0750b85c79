"""The report of a job as a table: the answer, and the rest on request."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from getp.cli import main as cli
from getp.report.report_table import print_report

ROOT = Path(__file__).parents[2]
ANSWER = [
    *("requests", "throughput", "time", "tokens", "time to first token", "time per output token"),
    *("efficiency", "largest loss", "device"),
]
DETAILS = ["warm-up", "finish", "batch", "KV cache", "speculation", "peak memory", "versions"]
REPORT: dict[str, Any] = {
    "checkpoint": "model",
    "device": "cpu",
    "peak_gpu_memory_bytes": None,
    "balance": None,
    "replicas": None,
    "tensor_parallel": 1,
    "dtype": "bfloat16",
    "kv_dtype": "bfloat16",
    "kernels": [],
    "versions": {"getp": "1", "python": "2", "torch": "3"},
    "requests_resumed": 0,
    "requests_done": 5,
    "requests_failed": 0,
    "requests_ignored": 0,
    "requests_cut": 2,
    "prompt_tokens": 10,
    "cached_tokens": 0,
    "output_tokens": 20,
    "warm_up_s": 1.5,
    "check_s": 0.0,
    "load_s": 1.0,
    "compile_s": 0.0,
    "capture_s": 0.0,
    "inference_s": 2.0,
    "finish_s": 0.0,
    "output_tok_s": 10.0,
    "total_tok_s": 15.0,
    "ttft_median_s": 0.1,
    "ttft_p99_s": 0.2,
    "per_token_median_s": 0.01,
    "per_token_p99_s": 0.02,
    "steps": 3,
    "mean_batch": 2.0,
    "peak_batch": 4,
    "preemptions": 0,
    "draft_tokens": 40,
    "accepted_tokens": 31,
    "kv_bytes": 1024,
    "peak_kv_use": 0.5,
    "prefix_hit_rate": 0.0,
    "mfu": 0.117,
    "mbu": 0.043,
    "bound": "compute",
    "limit_share": 0.117,
    "largest_loss": "the decode batch was 2 of 64: too few requests to fill it",
    "peaks": "local: measured on a processor",
    "peak_memory_bytes": 2048,
}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def rows(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if line.startswith("│"):
            _, name, value, _ = (cell.strip() for cell in line.split("│"))
            yield name, value


def printed(capsys: pytest.CaptureFixture[str], details: bool, **changes: Any) -> dict[str, str]:
    print_report(REPORT | changes, details)
    return dict(rows(capsys.readouterr().err))


def test_the_answer_is_first_and_the_rest_is_shown_on_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = printed(capsys, details=False)
    assert [*short] == ANSWER
    assert short["requests"] == "5 done (2 truncated at the length limit), 0 failed"
    long = printed(capsys, details=True)
    assert [*long] == ANSWER + DETAILS
    assert {name: long[name] for name in ANSWER if name != "efficiency"} == {
        name: short[name] for name in ANSWER if name != "efficiency"
    }


@pytest.mark.parametrize(("bound", "other"), [("compute", "MBU 4.3%"), ("memory", "MFU 11.7%")])
def test_the_efficiency_is_stated_once(
    capsys: pytest.CaptureFixture[str], bound: str, other: str
) -> None:
    share = {"compute": 0.117, "memory": 0.043}[bound]
    short = printed(capsys, False, bound=bound, limit_share=share)["efficiency"]
    assert short == f"{share:.1%} of the measured peak of this machine ({bound}-bound)"
    assert printed(capsys, True, bound=bound, limit_share=share)["efficiency"] == (
        f"{short}; {other}"
    )


def test_more_than_the_measured_peak_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, False, limit_share=1.2)["efficiency"]
    assert "above 100%: the data was in caches, or the peak was measured" in shown


def test_replicas_are_one_row_that_names_those_that_died(
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = {
        "replica": 0,
        "host": "node",
        "requests": 2,
        "output_tokens": 8,
        "output_tok_s": 4.0,
        "mean_batch": 1.0,
        "busy": 0.5,
        "peak_memory_bytes": 1024,
        "deaths": 0,
        "requests_left_to_others": 0,
    }
    replicas = [one | {"replica": number} for number in range(1024)]
    replicas[7] |= {"deaths": 2, "requests_left_to_others": 3}
    short = printed(capsys, False, replicas=replicas, balance=0.5)
    assert len(short) == len(ANSWER) + 1
    assert short["replicas"] == (
        "1,024, busy for 50.0% of the time; replica 7 died 2 times, requests reassigned: 3"
    )
    long = printed(capsys, True, replicas=replicas[:8], balance=0.5)
    assert long["replica 6"].startswith("2 requests, 8 output tokens, 4.0 tok/s")
    assert long["replica 7"].endswith("died 2 times, requests reassigned: 3")


def test_the_option_selects_the_details(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.txt"
    source.write_text("1\nWhat is 2 plus 2?\n")
    args = ["-m", "getp", "-i", str(source), "-o", str(tmp_path / "out.txt")]
    assert cli.run(args) == 0
    assert "versions" not in dict(rows(capsys.readouterr().err))
    assert cli.run([*args, "--details"]) == 0
    assert "versions" in dict(rows(capsys.readouterr().err))


def test_the_example_in_the_readme_has_the_rows_of_the_report() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name, _ in rows(text) if name] == ANSWER


def test_kernels_are_named_only_where_they_are_not_the_tables(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "kernels" not in printed(capsys, True)
    named = ["experts: plain torch (instead of one that failed: one token: it [failed])"]
    assert printed(capsys, False, kernels=named)["kernels"] == named[0]
