"""Interrupted jobs are resumed and write the same bytes; jobs that cannot be resumed say so."""

import builtins
import errno
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from engine import SamplingParams
from getp.cli import loading
from getp.cli import main as cli
from getp.errors import SOME_FAILED, GetpError, Interrupted
from getp.job import run as job_run
from getp.job.prefetch import Prefetcher
from getp.job.request_reader import RequestDefaults
from getp.job.run import Job
from getp.job.signals import GracefulStop
from getp.text.answer_text import AnswerOptions
from tests.getp.helpers import FakeEngine, small_tokenizer, write_tokenizer

TOKENIZER = small_tokenizer()
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1750000000")


def job(tmp_path: Path, count: int = 12, output: str = "out.txt", **changes: Any) -> Job:
    lines = [f"prompt {n}" if n % 5 else "" for n in range(1, count + 1)]
    (tmp_path / "in.txt").write_text("\n".join([str(count), *lines, ""]))
    params = SamplingParams(**changes.pop("params", {}))
    files = {"input": str(tmp_path / "in.txt"), "output": str(tmp_path / output)}
    return Job(**{**files, "checkpoint": "small", "defaults": RequestDefaults(params), **changes})


def run(work: Job, engine: Any = None) -> int:
    engine = engine if engine is not None else FakeEngine()
    return job_run.run_job(work, job_run.read(work), TOKENIZER, engine)


def engine_that_fails_after(count: int, error: BaseException) -> FakeEngine:
    calls = 0

    def answer(prompt: Sequence[int]) -> Sequence[int]:
        nonlocal calls
        calls += 1
        if calls > count:
            raise error
        return prompt

    return FakeEngine(answer)


@pytest.mark.parametrize("output", ["out.txt", "out.jsonl", "out.jsonl.gz"])
def test_resumed_job_runs_only_the_rest_and_writes_the_same_bytes(
    tmp_path: Path, output: str
) -> None:
    work = job(tmp_path, output=output)
    assert run(work) == SOME_FAILED
    expected = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    Path(work.output).unlink()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="gone"):
            run(work, engine_that_fails_after(3, RuntimeError("the device is gone")))
    engine = FakeEngine()
    assert run(work, engine) == SOME_FAILED
    assert len(engine.requests) < 6
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected


def test_job_that_lacks_only_its_result_file_does_not_load_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = job(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("getp.job.results._write", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(work)
    engine = FakeEngine()
    monkeypatch.setattr(engine, "warm_up", None)
    assert run(work, engine) == SOME_FAILED
    assert len(Path(work.output).read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": {"temperature": 0.7}}, r"temperature 0.0, now 0.7"),
        ({"count": 13}, "started with input "),
        ({"output_format": "text"}, "output format 'ids', now 'text'"),
        ({"identity": {"checkpoint": "b"}}, "checkpoint 'a', now 'b'"),
    ],
)
def test_changed_job_is_refused_unless_it_starts_over(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    before: dict[str, Any] = {"identity": {"checkpoint": "a"}}
    with pytest.raises(RuntimeError):
        run(job(tmp_path, **before), engine_that_fails_after(3, RuntimeError()))
    changed: dict[str, Any] = {**before, **changes}
    with pytest.raises(GetpError, match=words):
        run(job(tmp_path, **changed))
    assert run(job(tmp_path, **changed, restart=True)) == SOME_FAILED


def test_input_edited_during_a_job_is_never_mixed_with_the_original(
    tmp_path: Path,
) -> None:
    count = 10_000  # more than are prefetched
    work = job(tmp_path, count, schedule="first")
    before = Path(work.input).read_bytes()

    def answer(prompt: Sequence[int]) -> Sequence[int]:
        with open(work.input, "r+b") as file:
            file.seek(before.index(b"prompt 9999"))
            file.write(b"P")
        return prompt

    with pytest.raises(GetpError, match="line 10000: was changed while the job ran"):
        run(work, FakeEngine(answer))
    Path(work.input).write_bytes(before)
    engine = FakeEngine()
    assert run(work, engine) == SOME_FAILED
    assert len(engine.requests) < count / 2
    resumed = Path(work.output).read_bytes()
    assert run(work) == SOME_FAILED
    assert Path(work.output).read_bytes() == resumed


def test_time_in_a_chat_template_is_when_the_job_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ strftime_now('%F %T') }} {{ messages[0].content }}"
    (tmp_path / "in.txt").write_text("3\none\ntwo\nthree\n")
    files: dict[str, Any] = {"input": str(tmp_path / "in.txt"), "output": str(tmp_path / "out.txt")}
    work = Job(
        **files,
        checkpoint="small",
        defaults=RequestDefaults(SamplingParams(), answer=AnswerOptions(chat=True)),
    )
    source, tokenizer = job_run.read(work), small_tokenizer(template)
    engine: Any = engine_that_fails_after(1, RuntimeError())
    with pytest.raises(RuntimeError):
        job_run.run_job(work, source, tokenizer, engine)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1760000000")
    engine = FakeEngine()
    assert job_run.run_job(work, source, tokenizer, engine) == 0
    began = datetime.fromtimestamp(1750000000).strftime("%F %T")
    texts = {tokenizer.decode(request.prompt_ids) for request in engine.requests}
    assert len(texts) == 2
    assert all(text.startswith(began) for text in texts)


@pytest.mark.parametrize("length", [0, 7, 300, -5])
def test_job_whose_journal_another_program_truncates_can_be_resumed(
    tmp_path: Path, length: int
) -> None:
    work = job(tmp_path, 40, schedule="first")
    assert run(work) == SOME_FAILED
    expected = Path(work.output).read_bytes()

    def answer(prompt: Sequence[int]) -> Sequence[int]:
        if len(engine.requests) == 12:
            size = os.stat(work.journal_path).st_size
            os.truncate(work.journal_path, length % size)
        return prompt

    engine = FakeEngine(answer)
    with pytest.raises(GetpError, match="was truncated by another program while the job ran"):
        run(work, engine)
    assert run(work) == SOME_FAILED
    assert Path(work.output).read_bytes() == expected


def test_resumed_job_keeps_the_random_seed_of_the_first_run(tmp_path: Path) -> None:
    seeds = {}
    work = job(tmp_path, params={"temperature": 1.0, "seed": 1}, seed_given=False)
    with pytest.raises(RuntimeError):
        run(work, engine := engine_that_fails_after(3, RuntimeError()))
    seeds.update({request.request_id: request.params.seed for request in engine.requests})
    second = FakeEngine()
    run(job(tmp_path, params={"temperature": 1.0, "seed": 2}, seed_given=False), second)
    whole = FakeEngine()
    run(job(tmp_path, params={"temperature": 1.0, "seed": 1}, output="o"), whole)
    seeds.update({request.request_id: request.params.seed for request in second.requests})
    assert seeds == {request.request_id: request.params.seed for request in whole.requests}


def test_too_many_failures_end_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GetpError, match=r"failed requests: 2, more than max_errors 1.*line"):
        run(job(tmp_path, max_errors=1))
    shown = capsys.readouterr().err
    assert "raise max_errors to resume, or start over with restart" in shown
    assert "the same command" not in shown
    assert run(job(tmp_path, max_errors=2)) == SOME_FAILED


class _Faulty(io.FileIO):
    """A file whose writes fail after a given number of them."""

    budget = 10**9
    code = errno.ENOSPC

    def write(self, data: Any) -> int:
        _Faulty.spend()
        return super().write(data)

    @classmethod
    def spend(cls) -> None:
        if cls.budget == 0:
            raise OSError(cls.code, os.strerror(cls.code))
        cls.budget -= 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_job_can_be_resumed_after_any_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real_pwrite, real_open = os.pwrite, builtins.open

    def pwrite(fd: int, data: bytes, at: int) -> int:
        if _Faulty.budget == 0:
            real_pwrite(fd, data[: len(data) // 2], at)
        _Faulty.spend()
        return real_pwrite(fd, data, at)

    def fsync(fd: int) -> None:
        _Faulty.spend()  # no real fsync, which would take long

    def opened(path: Any, mode: str = "r", *args: Any, **rest: Any) -> Any:
        if mode == "wb":
            return io.BufferedWriter(_Faulty(path, "w"), 16)
        return real_open(path, mode, *args, **rest)

    _Faulty.code, _Faulty.budget = code, 10**9
    work = job(tmp_path, flush_s=0)
    run(work)
    expected = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("getp.files.open", opened, raising=False)
    faults = 0
    for budget in range(200):
        Path(work.output).unlink(missing_ok=True)
        _Faulty.budget = budget
        try:
            status = run(work)
        except GetpError as error:
            assert os.strerror(code) in str(error)  # noqa: PT017 - it may also be done
            faults += 1
            _Faulty.budget = 10**9
            status = run(work)
        assert status == SOME_FAILED
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected
        if _Faulty.budget < 10**8:
            break
    assert faults > 40


def test_first_signal_lets_running_requests_finish_and_starts_no_more(tmp_path: Path) -> None:
    def answer(prompt: Sequence[int]) -> Iterator[int]:
        if len(engine.requests) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        yield from prompt

    engine = FakeEngine(answer)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"4 of 40 requests are done and saved in") as stopped:
        run(job(tmp_path, 40, schedule="first"), engine)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert run(job(tmp_path, 40)) == SOME_FAILED


def test_requests_that_exceed_the_grace_period_run_again_next_time(tmp_path: Path) -> None:
    def answer(prompt: Sequence[int]) -> Iterator[int]:
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            time.sleep(0.01)
            yield 9

    started = time.monotonic()
    work = job(tmp_path, 40, grace_s=0.2, schedule="first")
    with pytest.raises(Interrupted, match="0 of 40 requests are done"):
        run(work, FakeEngine(answer, max_positions=10**9))
    assert time.monotonic() - started < 5


def test_prefetching_is_bounded_by_total_cost() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            made.append(item)
            yield item

    with Prefetcher(items(), lambda item: 10, 50) as prefetcher:
        taken = prefetcher.until(lambda: False)
        assert next(taken) == 0
        time.sleep(0.1)
        assert len(made) <= 8
        assert list(taken) == list(range(1, 100))
    assert threading.active_count() < 10


def test_error_in_the_prefetching_thread_is_raised_where_items_are_taken() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise GetpError("no more")

    with (
        Prefetcher(items(), lambda item: 1, 50) as prefetcher,
        pytest.raises(GetpError, match="no more"),
    ):
        list(prefetcher.until(lambda: False))


def test_job_reads_standard_input_and_writes_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    checkpoint = str(write_tokenizer(tmp_path / "checkpoint"))
    stdin = io.TextIOWrapper(io.BytesIO(b'{"prompt": "hi", "id": "x"}\n'))
    monkeypatch.setattr(sys, "stdin", stdin)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    left: list[Path] = []

    def load_engine(options: object) -> FakeEngine:
        left.extend(temporary.iterdir())  # files that a killed process would leave behind
        return FakeEngine()

    monkeypatch.setattr(loading, "load_engine", load_engine)
    assert cli.run([checkpoint, "-m", "getp", "-i", "-", "-o", "-"]) == 0
    assert left == []
    (line,) = capfdbinary.readouterr().out.splitlines()
    assert json.loads(line)["custom_id"] == "x"


def test_results_go_to_a_file_if_standard_output_fails(tmp_path: Path) -> None:
    checkpoint = write_tokenizer(tmp_path / "checkpoint")
    (tmp_path / "in.txt").write_text("2\nhello\nworld\n")
    program = (
        "import sys; from getp.cli import loading, main; "
        "from tests.getp.helpers import FakeEngine; "
        "loading.load_engine = lambda settings: FakeEngine(); sys.argv[0] = 'getp'; main.main()"
    )
    args = [sys.executable, "-c", program, str(checkpoint), "-m", "getp", "-o", "-"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*args, "-i", str(tmp_path / "in.txt")], cwd=tmp_path, stdout=full, check=False,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "No space left on device; the results are in getp-results-" in last
    (rescued,) = tmp_path.glob("getp-results-*.txt")
    assert len(rescued.read_text().splitlines()) == 2


def test_error_names_a_full_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GetpError, match=r"^cannot write /dev/full: No space.*; the results are"):
        run(job(tmp_path, output="/dev/full"))


def test_results_of_a_job_larger_than_the_prefetch_limit_are_in_input_order(
    tmp_path: Path,
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi", "max_tokens": 1}\n' * 3000)
    work = job(tmp_path, input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "o.jsonl"))
    engine = FakeEngine(batch=64)
    assert run(work, engine) == 0
    ids = [json.loads(line)["custom_id"] for line in Path(work.output).read_text().splitlines()]
    assert ids == [f"request-{n}" for n in range(3000)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_passes_through_except_exception_of_interrupted_code(
    number: signal.Signals,
) -> None:
    def start() -> None:
        try:
            signal.raise_signal(number)
        except Exception:  # as in Thread.start
            raise KeyError from None

    with pytest.raises(Interrupted) as stopped, GracefulStop(1.0):
        start()
    assert stopped.value.exit_code == 128 + number


def test_killed_interrupted_and_damaged_jobs_end_with_the_same_bytes(tmp_path: Path) -> None:
    args = [sys.executable, "-m", "tests.getp.faults", str(tmp_path), "--faults", "25"]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()[-2000:]
    assert json.loads(done.stdout)["survived"] >= 25
