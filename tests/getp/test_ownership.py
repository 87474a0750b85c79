"""Files of other jobs and of the user are neither deleted nor replaced; see getp/ownership.py."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine import SamplingParams
from getp.cli import main as cli
from getp.errors import SOME_FAILED, GetpError
from getp.files import check_writable, open_output
from getp.job import run as job_run
from getp.job.formats.interface import Failure, ResultContext
from getp.job.formats.token_lines import TOKEN_LINES
from getp.job.request_reader import RequestDefaults
from getp.job.run import Job
from getp.ownership import errors_path, is_errors_file, remove_leftovers
from tests.getp.helpers import FakeEngine, small_tokenizer, write_tokens

TOKENIZER = small_tokenizer()


def job(tmp_path: Path, name: str, prompts: Sequence[str] = ("a", "b", "c"), **more: Any) -> Job:
    source = tmp_path / f"for-{name}.txt"
    source.write_text("\n".join([str(len(prompts)), *prompts, ""]))
    defaults = RequestDefaults(SamplingParams(stop_ids=TOKENIZER.stop_ids))
    files = {"input": str(source), "output": str(tmp_path / name)}
    return Job(**{**files, "checkpoint": "small", "defaults": defaults, **more})


def run(work: Job, meanwhile: Callable[[], object] = lambda: None) -> int:
    """Run the job; call `meanwhile` once, while it runs its requests."""
    calls = 0

    def answer(prompt: Sequence[int]) -> Iterable[int]:
        nonlocal calls
        calls += 1
        if calls == 2:
            meanwhile()
        return prompt

    engine: Any = FakeEngine(answer, batch=1)
    return job_run.run_job(work, job_run.read(work), TOKENIZER, engine)


def rows(work: Job) -> int:
    return len(Path(work.output).read_text().splitlines())


def test_result_that_is_named_like_another_jobs_journal_is_refused_before_the_work(
    tmp_path: Path,
) -> None:
    first, second = job(tmp_path, "x.txt"), job(tmp_path, "x.txt.journal")

    def start_second() -> None:
        with pytest.raises(GetpError, match=r"x\.txt\.journal is the journal of another job"):
            job_run.read(second)

    assert run(first, start_second) == 0
    assert rows(first) == 3
    assert not Path(second.output).exists()
    assert run(second) == 0
    assert rows(second) == 3


@pytest.mark.parametrize("restart", [False, True])
def test_finished_result_at_the_path_of_the_journal_is_kept(tmp_path: Path, restart: bool) -> None:
    first, second = job(tmp_path, "x.txt", restart=restart), job(tmp_path, "x.txt.journal")
    run(second)
    before = Path(second.output).read_bytes()
    with pytest.raises(GetpError, match=r"x\.txt\.journal is not a journal.*move that file"):
        run(first)
    assert Path(second.output).read_bytes() == before


def test_result_never_replaces_a_journal_that_appeared_while_its_job_ran(tmp_path: Path) -> None:
    first, second = job(tmp_path, "x.txt"), job(tmp_path, "x.txt.journal")

    def run_first_until_killed() -> None:
        with pytest.raises(ZeroDivisionError):
            run(first, lambda: 1 / 0)

    with pytest.raises(GetpError, match=r"x\.txt\.journal is the journal of another job"):
        run(second, run_first_until_killed)
    assert run(first) == 0  # resumes
    assert run(second) == 0
    assert rows(first) == rows(second) == 3


def test_file_that_replaced_the_journal_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = job(tmp_path, "x.txt")
    journal = Path(work.journal_path)

    def replace() -> None:
        (tmp_path / "new").write_text("of somebody else\n")
        os.replace(tmp_path / "new", journal)

    assert run(work, replace) == 0
    assert rows(work) == 3
    assert journal.read_text() == "of somebody else\n"
    assert f"{journal} was replaced by another program" in capsys.readouterr().err


def test_interrupted_job_says_that_its_journal_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = job(tmp_path, "x.txt")

    def remove() -> None:
        Path(work.journal_path).unlink()
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError):
        run(work, remove)
    shown = capsys.readouterr().err
    assert "1 of 3 requests are done, not saved:" in shown
    assert "was deleted or replaced while the job ran" in shown


@pytest.mark.parametrize("content", ["", "my notes\n", "my notes", '{"line": 3}\n', "0 1 2\n"])
def test_file_that_is_not_an_errors_file_is_kept(tmp_path: Path, content: str) -> None:
    own = tmp_path / "x.txt.errors.jsonl"
    own.write_text(content)
    assert run(job(tmp_path, "x.txt")) == 0
    assert own.read_text() == content
    assert run(job(tmp_path, "x.txt", ["a", "", "c"])) == SOME_FAILED
    assert own.read_text() == content
    second = tmp_path / "x.txt.errors-2.jsonl"
    assert json.loads(second.read_text())["line"] == 3
    assert run(job(tmp_path, "x.txt")) == 0
    assert own.read_text() == content
    assert not second.exists()  # getp's own, of the earlier job


def test_message_and_result_name_the_same_errors_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.txt.errors.jsonl").write_text("my notes\n")
    run(job(tmp_path, "x.txt", ["a", ""]))
    assert "failed: see " + str(tmp_path / "x.txt.errors-2.jsonl") in capsys.readouterr().err


def test_lines_of_an_errors_file_are_recognised(tmp_path: Path) -> None:
    failure = Failure(3, 5, "request-3", "empty_prompt", "the prompt is empty")
    line = TOKEN_LINES.failed(ResultContext(TOKENIZER, "small", "", 0), failure) + b"\n"
    path = tmp_path / "x.errors.jsonl"
    path.write_bytes(line * 3)
    assert is_errors_file(str(path))
    assert errors_path(str(tmp_path / "x")) == str(path)
    path.write_bytes(line * 3 + b"mine\n")
    assert not is_errors_file(str(path))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert not is_errors_file(str(tmp_path / "link"))
    assert not is_errors_file(str(tmp_path))


@pytest.mark.parametrize("content", [b"not a journal\n", b"\0" * 100, b"1 2 3\n" * 2000, b"{}"])
@pytest.mark.parametrize("restart", [False, True])
def test_file_that_is_not_a_journal_is_never_truncated(
    tmp_path: Path, content: bytes, restart: bool
) -> None:
    (tmp_path / "x.txt.journal").write_bytes(content)
    with pytest.raises(GetpError, match=r"x\.txt\.journal is not a journal"):
        run(job(tmp_path, "x.txt", restart=restart))
    assert (tmp_path / "x.txt.journal").read_bytes() == content


def test_every_mode_refuses_to_write_to_a_journal(tmp_path: Path) -> None:
    work = job(tmp_path, "x.txt")
    with pytest.raises(ZeroDivisionError):
        run(work, lambda: 1 / 0)
    journal = work.journal_path
    for role in ("output", "report", "trace"):
        with pytest.raises(GetpError, match="is the journal of another job"):
            check_writable(journal, role)
    write_tokens(str(tmp_path / "tokens.txt"), [[1]])
    assert cli.run(["-m", "decode", "-i", str(tmp_path / "tokens.txt"), "-o", journal]) == 1
    with pytest.raises(GetpError, match="is the journal of another job"):
        write_tokens(journal, [[1]])
    assert run(work) == 0


def test_temporary_files_of_killed_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    others = [
        ".x.txt.123.tmp",
        ".x.txt.tmp",
        ".x.txt.getp-1-notes.tmp",
        ".y.txt.getp-1-0a0b0c0d.tmp",
    ]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".x.txt.getp-123-0a0b0c0d.tmp").touch()
    with open_output(str(target)) as file:
        file.write(b"being written")
        remove_leftovers(str(target))
    assert target.read_bytes() == b"being written"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "x.txt"])


def test_results_saved_from_a_failing_stream_do_not_replace_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with pytest.raises(GetpError, match="the results are in getp-results-"):
            run(job(tmp_path, "y.txt", output="/dev/full"))
    assert len(list(tmp_path.glob("getp-results-*"))) == 2
