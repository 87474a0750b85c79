"""Jobs with tensor parallelism write the same bytes and leave no processes running."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_end_to_end import DATA, ROOT, getp, share_correct

_FLAGS = ("--dtype", "float32")


def command(output: Path, *args: object) -> list[str]:
    job = ["-m", "getp", "-i", DATA / "input.txt", "-o", output, *_FLAGS, *args]
    return [sys.executable, "run.py", *map(str, job)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def one_rank_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job with one rank."""
    output = tmp_path_factory.mktemp("one_rank") / "output.txt"
    getp(*command(output)[2:])
    return output


def test_two_ranks_give_the_same_bytes_as_one(one_rank_output: Path, tmp_path: Path) -> None:
    output, report = tmp_path / "o.txt", tmp_path / "r.json"
    run = getp(*command(output, "--tensor-parallel", 2, "--report", report)[2:])
    assert '"tensor_parallel": 2' in report.read_text()
    assert "tensor parallel over 2" in run.stderr
    assert output.read_bytes() == one_rank_output.read_bytes()
    assert share_correct(output, tmp_path) >= 0.95


def test_torchrun_gives_the_same_bytes_as_the_option(one_rank_output: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.txt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*torchrun, *command(output)[1:]],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("elapsed time(s)") == 1
    assert "tensor parallel over 2" in run.stderr
    assert output.read_bytes() == one_rank_output.read_bytes()


def test_killed_rank_of_torchrun_ends_the_job(one_rank_output: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "o.txt", tmp_path / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with open(log, "wb") as file:
        job = subprocess.Popen(
            [*torchrun, *command(output, "--max-batch-size", 2)[1:]],
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=file,
        )
    wait_for_results(output, 5, job, log)
    first, other = sorted(children(job.pid), key=rank_of_torchrun)
    os.kill(other, signal.SIGKILL)
    assert job.wait(60) == 1
    wait_for_the_end_of(first)
    # torchrun names the rank; it may have ended the first one before that printed anything.
    assert re.search(r"rank +: 1 .*\n *exitcode +: -9", log.read_text())
    assert not output.exists()
    assert "are done already" in getp(*command(output)[2:]).stderr
    assert output.read_bytes() == one_rank_output.read_bytes()


def rank_of_torchrun(pid: int) -> bytes:
    """Return the RANK of a process."""
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (rank,) = [word for word in words if word.startswith(b"RANK=")]
    return rank


def test_impossible_split_is_a_usage_error(tmp_path: Path) -> None:
    run = getp(*command(tmp_path / "o.txt", "--tensor-parallel", 4)[2:], status=2)
    assert "--tensor-parallel 4: this model (6 heads, 2 KV heads, 8 experts" in run.stderr
    assert "possible: 1, 2" in run.stderr


def kill_other(job: "subprocess.Popen[bytes]", other: int) -> None:
    os.kill(other, signal.SIGKILL)


def kill_first(job: "subprocess.Popen[bytes]", other: int) -> None:
    job.kill()


def press_ctrl_c(job: "subprocess.Popen[bytes]", other: int) -> None:
    os.killpg(job.pid, signal.SIGINT)


@pytest.mark.parametrize(
    ("disturb", "status", "words"),
    [
        (kill_other, 1, "rank 1 of 2 died: killed by signal 9"),
        (kill_first, -signal.SIGKILL, ""),
        (press_ctrl_c, 130, "the same command resumes the job"),
    ],
)
def test_disturbed_job_ends_at_once_and_can_be_resumed(
    disturb: Callable[["subprocess.Popen[bytes]", int], None],
    status: int,
    words: str,
    one_rank_output: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "o.txt"
    journal = Path(f"{output}.journal")
    with open(tmp_path / "log", "wb") as log:
        job = subprocess.Popen(
            command(output, "--tensor-parallel", 2, "--max-batch-size", 4, "--grace", 0),
            cwd=ROOT,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,  # a process group of its own, like in a shell
        )
        wait_for_results(output, 20, job, tmp_path / "log")
        (other,) = children(job.pid)
        disturb(job, other)
        assert job.wait(60) == status
    wait_for_the_end_of(other)
    assert words in (tmp_path / "log").read_text()
    assert not output.exists()
    done = journal.read_bytes().count(b"\n") - 1
    resumed = getp(*command(output)[2:])
    assert "are done already" in resumed.stderr
    assert done >= 19
    assert output.read_bytes() == one_rank_output.read_bytes()


def wait_for_results(output: Path, count: int, job: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the journal has `count` lines."""
    journal = Path(f"{output}.journal")
    while not journal.exists() or journal.read_bytes().count(b"\n") < count:
        assert job.poll() is None, log.read_text()
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")  # those of each thread
    return [int(word) for path in tasks for word in path.read_text().split()]


def wait_for_the_end_of(pid: int) -> None:
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < end, "a rank was left behind"
        time.sleep(0.02)
