"""A server as a process: its start, its ranks, and its end."""

import json
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from getp.cli import main as cli
from getp.cli.modes import serve as mode
from tests.getp.serve.running import QUESTION, free_port
from tests.getp.serve.test_batches import serve
from tests.getp.test_tensor_parallel_job import children, wait_for_the_end_of


def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mode, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert cli.run(["-m", "serve"]) == 1
    message = capsys.readouterr().err
    assert "mode serve needs uvicorn: pip install 'getp[serve]'" in message


def test_the_first_of_two_ranks_serves_and_a_second_signal_ends_both_at_once(
    tmp_path: Path,
) -> None:
    port = free_port()
    process = serve(tmp_path, port, "--tensor-parallel", "2", "--device", "cpu", "--grace", "600")
    try:
        ask = f"http://127.0.0.1:{port}/v1/completions"

        def complete(**body: Any) -> Any:
            data = json.dumps({"prompt": QUESTION, "temperature": 0, **body}).encode()
            return urllib.request.urlopen(urllib.request.Request(ask, data), timeout=60)

        with complete() as response:
            assert json.loads(response.read())["choices"][0]["text"] == "42"
        (other,) = children(process.pid)
        with complete(n=64, max_tokens=480, ignore_eos=True, stream=True) as stream:
            stream.read(1)
            process.terminate()
            assert process.stderr is not None
            assert any("stopping: waiting up to 600 s" in line for line in process.stderr)
            process.terminate()
            assert process.wait(60) == -signal.SIGTERM
        wait_for_the_end_of(other)
    finally:
        process.kill()
        process.wait()
