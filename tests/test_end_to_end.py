"""The whole product with the embedded model, through the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"


def getp(*args: object, stdin: str = "", status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line, with one thread because the model is tiny."""
    result = subprocess.run(
        [sys.executable, "run.py", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == status, result.stderr
    return result


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main job on data/input.txt; its folder has output.txt, report.json and stdout."""
    folder = tmp_path_factory.mktemp("job")
    output, report = folder / "output.txt", folder / "report.json"
    run = getp("-m", "getp", "-i", DATA / "input.txt", "-o", output, "--report", report)
    (folder / "stdout").write_text(run.stdout)
    return folder


def share_correct(tokens: Path, folder: Path) -> float:
    """Return the share of correct answers in a file of token ids."""
    report = folder / "eval.json"
    getp("-m", "eval", "-i", tokens, "--expected", DATA / "answers.txt", "--report", report)
    return float(json.loads(report.read_text())["expected"]["share_right"])


def test_the_main_job_answers_95_percent_of_held_out_questions_correctly(job: Path) -> None:
    lines = (job / "output.txt").read_text().splitlines()
    assert len(lines) == int((DATA / "input.txt").read_text().split("\n")[0]) >= 200
    assert all(re.fullmatch(r"\d+( \d+)*", line) for line in lines)
    last = (job / "stdout").read_text().splitlines()[-1]
    assert re.fullmatch(
        r"elapsed time\(s\): \d+\.\d{6}, achieved throughput TPS \(tok/s\): \d+\.\d{6}", last
    )
    assert share_correct(job / "output.txt", job) >= 0.95


def test_with_the_chat_template_95_percent_of_the_answers_are_correct(tmp_path: Path) -> None:
    output = tmp_path / "chat.txt"
    getp("-m", "getp", "-i", DATA / "input.txt", "-o", output, "--chat-template")
    assert share_correct(output, tmp_path) >= 0.95


def test_98_percent_of_the_answers_are_equal_in_float32_and_bfloat16(
    job: Path, tmp_path: Path
) -> None:
    output = tmp_path / "float32.txt"
    getp("-m", "getp", "-i", DATA / "input.txt", "-o", output, "--dtype", "float32")
    float32 = output.read_text().splitlines()
    bfloat16 = (job / "output.txt").read_text().splitlines()
    assert sum(a == b for a, b in zip(float32, bfloat16, strict=True)) >= 0.98 * len(float32)


def test_prompts_are_longer_than_the_window_and_the_original_context(job: Path) -> None:
    """Otherwise these jobs would not test windows and YaRN."""
    config = json.loads((DATA / "model" / "config.json").read_text())
    report = json.loads((job / "report.json").read_text())
    longest = getp(
        "-m",
        "generate",
        "-i",
        "What is 4 plus 5?",
        "--chat-template",
        "-y",
        "You are a calculator.",
    )
    prompt = int(re.search(r"of (\d+) prompt tokens", longest.stderr)[1])  # type: ignore[index]
    assert prompt > config["rope_scaling"]["original_max_position_embeddings"]
    assert report["prompt_tokens"] / report["requests_done"] > config["sliding_window"]


def test_a_chat_keeps_its_history_and_runs_its_commands() -> None:
    lines = [
        "What is 12 plus 7?",
        "/system Be brief.",
        "What is 20 plus 30?",
        "/reset",
        "/nonsense",
    ]
    run = getp("-m", "chat", stdin="\n".join([*lines, "What is 5 plus 6?", "/quit", "ignored"]))
    assert run.stdout.split() == ["19", "50", "11"]
    assert "unknown command /nonsense" in run.stderr
    assert run.stderr.count("tok/s") == 3
    assert "analysis" in run.stderr  # shown separately from the answer


def test_a_truncated_input_file_gives_one_line_of_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.txt"
    path.write_text("3\nonly one\n")
    run = getp("-m", "getp", "-i", path, "-o", tmp_path / "out.txt", status=1)
    assert run.stderr.count("\n") == 1
    assert f"{path}: line 1 says 3 prompts, but the file has only 1" in run.stderr
    assert not (tmp_path / "out.txt").exists()


def test_bad_requests_do_not_affect_the_others(tmp_path: Path) -> None:
    path, output = tmp_path / "mixed.txt", tmp_path / "out.txt"
    path.write_bytes(b"4\nWhat is 4 plus 5?\n\n\xff\xfe\n" + b"A" * 5000 + b"\n")
    getp("-m", "getp", "-i", path, "-o", output, status=3)
    lines = output.read_text().split("\n")
    assert lines[0]
    assert lines[1:] == ["", "", "", ""]
    errors = [json.loads(e) for e in Path(f"{output}.errors.jsonl").read_text().splitlines()]
    assert [e["line"] for e in errors] == [3, 4, 5]


def test_the_make_targets_and_options_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^make (\w+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert {"getp", "test"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    known = getp("--help").stdout
    # Options of benchmarks, Ray, torchrun and lm-evaluation-harness.
    others = {"--load", "--quick", "--help", "--head", "--port", "--address", "--nproc-per-node"}
    others |= {"--model", "--tasks"}
    assert all(option in known for option in options - others), options
