"""Batches, as the openai package uses them, and through a kill of the server."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from getp.errors import GetpError
from getp.serve.batches import UNFINISHED, Batches
from tests.getp.serve.running import MODEL, QUESTION, RunningServer, free_port, wait_until

CHAT = "/v1/chat/completions"
ROOT = Path(__file__).resolve().parents[3]


def lines(count: int, **body: Any) -> bytes:
    """An input file; answers of `body` alone would end after a few tokens."""
    found = [
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": CHAT,
            "body": {
                "messages": [{"role": "user", "content": f"What is {number} plus 3?"}],
                "temperature": 0,
                **body,
            },
        }
        for number in range(count)
    ]
    return b"".join(json.dumps(each).encode() + b"\n" for each in found)


def start(client: openai.OpenAI, data: bytes, window: str = "24h") -> Any:
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    create: Any = client.batches.create
    return create(input_file_id=file.id, endpoint=CHAT, completion_window=window)


def finished(client: openai.OpenAI, batch: Any) -> Any:
    wait_until(lambda: client.batches.retrieve(batch.id).status not in UNFINISHED)
    return client.batches.retrieve(batch.id)


def results(client: openai.OpenAI, file_id: str) -> dict[str, Any]:
    found = map(json.loads, client.files.content(file_id).text.splitlines())
    return {each["custom_id"]: each for each in found}


def test_a_batch_is_answered_and_its_bad_requests_are_errors(server: RunningServer) -> None:
    client = server.client
    data = lines(30).replace(b'"What is 4 plus 3?"', b"4").replace(b'"r5"', b'"r6"')
    other = lines(1).replace(CHAT.encode(), b"/v1/completions").replace(b"r0", b"other")
    metadata = {"for": "a test"}
    file = client.files.create(file=("in.jsonl", data + other), purpose="batch")
    create: Any = client.batches.create
    batch = create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata=metadata)
    assert batch.status == "validating"
    done = finished(client, batch)
    assert (done.status, done.metadata) == ("completed", metadata)
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (31, 28, 3)
    answers, errors = results(client, done.output_file_id), results(client, done.error_file_id)
    assert {name: each["error"]["code"] for name, each in errors.items()} == {
        "r4": "invalid_value",
        "r6": "duplicate_custom_id",
        "other": "mismatched_url",
    }
    body = answers["r7"]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == "10"
    assert body["model"] == MODEL
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
    assert done.completed_at >= done.in_progress_at >= done.created_at


def test_batches_are_listed_cancelled_and_expire(server: RunningServer) -> None:
    client = server.client
    long = lines(400, max_tokens=150, ignore_eos=True)
    first, second = start(client, long), start(client, long, "1s")
    with pytest.raises(openai.ConflictError):
        client.files.delete(first.input_file_id)
    listed = client.batches.list(limit=1)
    assert [each.id for each in listed.data] == [second.id]
    assert listed.has_more
    assert {first.id, second.id} <= {each.id for each in listed}
    wait_until(lambda: client.batches.retrieve(first.id).request_counts.completed > 0)
    assert client.batches.cancel(first.id).status == "cancelling"
    cancelled, expired = finished(client, first), finished(client, second)
    assert (cancelled.status, expired.status) == ("cancelled", "expired")
    counts = cancelled.request_counts
    assert 0 < counts.completed < counts.total
    assert len(results(client, cancelled.output_file_id)) == counts.completed
    errors = results(client, expired.error_file_id)
    assert len(errors) == 400 - expired.request_counts.completed
    assert {each["error"]["code"] for each in errors.values()} == {"batch_expired"}
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(first.id)
    client.files.delete(first.input_file_id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(first.input_file_id)
    wait_until(lambda: server.metric("getp_running") == 0)


def test_a_file_that_is_no_batch_fails_its_batch(server: RunningServer) -> None:
    failed = finished(server.client, start(server.client, b"[1]\n"))
    assert failed.status == "failed"
    assert "JSON array" in failed.errors.data[0].message
    assert str(server.config.data) not in failed.errors.data[0].message


def test_a_file_instead_of_the_folder_of_batches_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nothing: Any = None
    with pytest.raises(GetpError, match="file: it is not a folder"):
        Batches(tmp_path / "file", nothing, nothing, nothing)


def test_two_batches_share_the_engine_and_online_requests_come_first(
    server: RunningServer,
) -> None:
    client = server.client
    long = lines(400, max_tokens=60, ignore_eos=True)
    pair = [start(client, long), start(client, long)]
    found = lambda: [client.batches.retrieve(each.id) for each in pair]  # noqa: E731
    wait_until(lambda: all(each.status == "in_progress" for each in found()))
    before = [each.request_counts.completed for each in found()]
    done = lambda: [  # noqa: E731
        each.request_counts.completed - first for each, first in zip(found(), before, strict=True)
    ]
    wait_until(lambda: sum(done()) >= 48)
    assert min(done()) >= 8
    for _ in range(3):
        stream = client.completions.create(model=MODEL, prompt=QUESTION, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "42"
    assert all(client.batches.retrieve(each.id).status == "in_progress" for each in pair)
    for each in pair:
        client.batches.cancel(each.id)
        finished(client, each)


SECTION = (ROOT / "README.md").read_text().split("### A server\n")[1].split("\n### ")[0]
START, CURL, PROGRAM = re.findall(r"```(?:python)?\n(.*?)```", SECTION, re.DOTALL)


def serve(data: Path, port: int, *args: str) -> "subprocess.Popen[str]":
    """Start the server with the README's command."""
    names = {"python": sys.executable, "served": str(data)}
    command = [names.get(word, word) for word in shlex.split(START)]
    command += ["--port", str(port), *args]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "serving" in line:
            return process
    raise AssertionError(f"the server ended with status {process.wait()}")


def test_a_killed_server_goes_on_and_runs_no_finished_request_again(tmp_path: Path) -> None:
    port = free_port()
    process = serve(tmp_path, port)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    batch = start(client, lines(160, max_tokens=60, ignore_eos=True))
    wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 20)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    journal = tmp_path / "batches" / f"{batch.id}.jsonl.journal"
    records = journal.read_bytes().splitlines()[1:]
    before = {record.split()[1]: record for record in records if record.endswith(b"}")}
    assert len(before) >= 20
    process = serve(tmp_path, port)
    try:
        done = finished(client, batch)
        assert done.status == "completed"
        assert done.request_counts.completed == 160
        answers = client.files.content(done.output_file_id).text.encode().splitlines()
        assert len(answers) == 160
        assert {record.split(b" ", 3)[3] for record in before.values()} <= set(answers)
        generated = [
            float(line.split()[1])
            for line in client._client.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
            if line.startswith("getp_output_tokens_total")
        ]
        assert generated[0] <= 60 * (160 - len(before))
        check_readme(tmp_path, port)
        stream: Any = client.completions.create(
            model=MODEL, prompt="1", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        process.terminate()  # running requests may finish
        assert sum(len(chunk.choices) for chunk in stream) > 300
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def check_readme(folder: Path, port: int) -> None:
    """Run the README's other commands."""
    curl, program = (text.replace(":8000", f":{port}") for text in (CURL, PROGRAM))
    run: Any = partial(subprocess.run, cwd=folder, check=True, capture_output=True, text=True)
    answer = json.loads(run(["sh", "-c", curl]).stdout)
    assert answer["choices"][0]["message"]["content"] == "42"
    printed = run([sys.executable, "-c", program]).stdout
    assert len(printed.strip().splitlines()) == 2
