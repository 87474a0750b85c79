"""The command without standard streams, and Ctrl-C while it starts: no traceback, true statuses."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from getp.cli import main as cli
from getp.errors import GetpError
from getp.files import check_writable
from getp.standard_streams import open_closed_streams
from getp.terminal import print_last_line

ROOT = Path(__file__).parents[2]


def shell(tmp_path: Path, line: str) -> tuple[int, str, str]:
    """Run a line of shell in which `getp` is the command; return status, output and errors.

    `job` is a job from in.txt to out.txt.
    """
    (tmp_path / "in.txt").write_text("2\nWhat is 1 plus 2?\nWhat is 2 plus 2?\n")
    job = f"getp -m getp -i {tmp_path}/in.txt -o {tmp_path}/out.txt"
    functions = f'getp() {{ {sys.executable} run.py "$@"; }}; job() {{ {job}; }}; '
    done = subprocess.run(
        ["bash", "-c", functions + line], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_job_between_files_needs_no_standard_stream(tmp_path: Path, closed: str) -> None:
    status, out, err = shell(tmp_path, f"job {closed}")
    assert status == 0
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 2
    assert ("elapsed time" in out) == (">&-" not in closed.replace("2>&-", ""))
    if closed == ">&-":
        assert "that line is not on standard output: cannot write" in err
    if "2>&-" in closed:
        assert not err
    assert not list(tmp_path.glob("*.journal"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("getp <&-", "cannot read standard input: it is closed"),
        ("getp -m getp -i - -o {0}/out.txt <&-", "cannot read standard input: it is closed"),
        ("getp -m getp -i {0}/in.txt -o - >&-", "cannot write to standard output: it is closed"),
        ("getp -m decode -i {0}/in.txt >&-", "cannot write to standard output: it is closed"),
        ("getp --version >&-", "cannot write to standard output: it is closed"),
        ("getp --help >&-", "cannot write to standard output: it is closed"),
    ],
)
def test_closed_stream_that_is_needed_is_named(tmp_path: Path, line: str, message: str) -> None:
    status, _, err = shell(tmp_path, line.format(tmp_path))
    assert (status, err) == (1, f"getp: error: {message}\n")


def test_job_whose_last_line_cannot_be_written_has_succeeded(tmp_path: Path) -> None:
    status, _, err = shell(tmp_path, "job >/dev/full")
    assert status == 0
    assert "that line is not on standard output: No space left on device" in err
    assert "elapsed time(s): " in err


def test_descriptors_of_closed_streams_are_not_given_to_other_files(tmp_path: Path) -> None:
    program = (
        "import os, sys; from getp.standard_streams import open_closed_streams as start; start();"
        f"file = os.open('{tmp_path}/new', os.O_CREAT | os.O_RDWR);"
        f"os.write(file, b'%d' % file); print('text', file=sys.stderr)"
    )
    assert shell(tmp_path, f'{sys.executable} -c "{program}" <&- >&- 2>&-')[0] == 0
    assert int((tmp_path / "new").read_text()) >= 3


def test_open_streams_stay_as_they_are() -> None:
    before = sys.stdin, sys.stdout, sys.stderr
    open_closed_streams()
    assert (sys.stdin, sys.stdout, sys.stderr) == before
    check_writable("-", "output")


def test_last_line_that_cannot_be_written_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with open(tmp_path / "out", "w") as file:

        class Full(io.StringIO):
            def flush(self) -> None:
                raise BrokenPipeError(32, "Broken pipe")

            def fileno(self) -> int:
                return file.fileno()

        monkeypatch.setattr(sys, "stdout", Full())
        print_last_line("the line")
    assert capsys.readouterr().err == (
        "the line\ngetp: that line is not on standard output: Broken pipe\n"
    )


def interrupted(command: list[str], delay_s: float) -> tuple[int, str]:
    """Send SIGINT some time after getp_command was imported; return the status and messages.

    Before that Python itself starts, which no program can influence.
    """
    process: Any = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stdin=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.rstrip().endswith("| getp_command"):
            break
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    messages = [line for line in rest.splitlines() if not line.startswith("import time:")]
    return process.returncode, "\n".join(messages)


@pytest.mark.parametrize("delay_s", [0.005, 0.05, 0.1, 0.2, 0.4, 0.8, 1.2])
@pytest.mark.parametrize("mode", ["generate", "getp"])
def test_ctrl_c_at_the_start_ends_the_command_with_one_line(
    tmp_path: Path, mode: str, delay_s: float
) -> None:
    source = tmp_path / "in.txt"
    source.write_text("3000\n" + "What is 1 plus 2?\n" * 3000)
    files = ["-i", str(source), "-o", str(tmp_path / "out.txt")] if mode == "getp" else []
    status, messages = interrupted(["run.py", "-m", mode, *files], delay_s)
    assert status == 130, messages
    *_, last = messages.splitlines()
    assert last.startswith(("getp: error: interrupted", "getp: error: stopped"))
    assert "Traceback" not in messages
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_during_an_import_ends_the_process_even_if_the_import_catches_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    print('on')\n"
        "except BaseException:\n    pass\n"
    )
    program = (
        "import sys, types, getp_command; fake = types.ModuleType('getp.cli.main');"
        "fake.main = lambda: __import__('slow'); sys.modules['getp.cli.main'] = fake;"
        f"sys.path.insert(0, '{tmp_path}'); getp_command.main(); print('not ended')"
    )
    status, out, err = shell(tmp_path, f'{sys.executable} -c "{program}"')
    assert (status, out, err) == (130, "", "getp: error: interrupted\n")


@pytest.mark.parametrize("caught", [KeyboardInterrupt, GetpError("x")])
def test_errors_of_the_command_keep_their_statuses(
    caught: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise caught

    monkeypatch.setattr(cli.command, "main", fail)
    assert cli.run([]) == (130 if caught is KeyboardInterrupt else 1)


def test_ctrl_c_while_python_shuts_down_keeps_the_status(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, atexit, types, getp_command;"
        "fake = types.ModuleType('getp.cli.main'); fake.main = lambda: sys.exit(3);"
        "sys.modules['getp.cli.main'] = fake;"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT)); getp_command.main()"
    )
    assert shell(tmp_path, f'{sys.executable} -c "{program}"') == (3, "", "")
