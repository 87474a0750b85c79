"""Replicas on Ray give the same results as one engine, even when replicas die."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from engine import Completion, Engine, EngineConfig, EngineError, Request, SamplingParams
from getp.cli import main as cli
from getp.cluster.driver import Cluster
from getp.cluster.replica import request_message
from getp.cluster.replica_state import ReplicaState
from getp.errors import SOME_FAILED, GetpError, Interrupted
from getp.job import run as job_run
from getp.job.journal import Journal
from getp.job.request_reader import RequestDefaults
from tests.getp.helpers import FakeEngine
from tests.getp.serve.running import MESSAGES, RunningServer, wait_until
from tests.getp.serve.test_batches import finished, lines, start
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "data" / "model"
SMALL = EngineConfig(dtype="float32", kv_memory=32 << 20, max_batch_size=4)


@pytest.fixture(scope="module")
def one_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray cluster that the tests share. Its workers can import the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        handler = signal.getsignal(signal.SIGTERM)
        # In /tmp, because the length of socket paths is limited.
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            logging_level="error",  # type: ignore[arg-type]
            log_to_driver=False,
        )
        signal.signal(signal.SIGTERM, handler)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1750000000")


def job(folder: Path, records: Sequence[dict[str, Any]]) -> job_run.Job:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "in.jsonl").write_text(lines)
    return job_run.Job(
        input=str(folder / "in.jsonl"),
        output=str(folder / "out.jsonl"),
        checkpoint="small",
        defaults=RequestDefaults(SamplingParams(seed=3, max_positions=200)),
    )


def run(work: job_run.Job, engine: Any) -> int:
    return job_run.run_job(work, job_run.read(work), Tokenizer.load(MODEL), engine)


def one_engine() -> Engine:
    engine = Engine(MODEL, SMALL)
    engine.tokenizer_json = (MODEL / "tokenizer.json").read_text
    return engine


def mixed_requests(count: int) -> list[dict[str, Any]]:
    """Valid and invalid requests of every kind, enough for each replica to get some of each."""
    records = []
    for index in range(count):
        record: dict[str, Any] = {"id": index, "prompt": f"What is {index} plus 17?"}
        if index % 3 == 0:
            record |= {"temperature": 1.5, "max_tokens": 3 + index % 7, "ignore_eos": True}
        if index % 5 == 2:
            record["stop"] = str((index + 17) % 10)
        if index % 4 == 3:
            record |= {"guided_regex": "[0-9]{3} apples", "temperature": 1}
        if index % 11 == 6:
            record["prompt"] = "x" * 900  # too long, which only the engine detects
        if index % 11 == 7:
            record["nonsense"] = 1
        records.append(record)
    return records


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The result of the mixed job by one engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1750000000")
        work = job(tmp_path_factory.mktemp("one"), mixed_requests(60))
        assert run(work, one_engine()) == SOME_FAILED
    result = Path(work.output).read_bytes()
    assert len(re.findall(rb"[0-9]{3} apples", result)) > 5
    codes = re.findall(rb'"code": ?"(\w+)"', result)
    assert set(codes) == {b"request_error", b"unknown_parameter"}
    assert result.count(b'"finish_reason":"stop"') + result.count(b'"finish_reason": "stop"') > 20
    return result


def test_one_two_and_four_replicas_give_the_tokens_of_one_engine(
    one_ray: str, checkpoint: Callable[[str], Path]
) -> None:
    requests = [
        Request(
            list(range(1, 4 + 5 * index)),
            SamplingParams(
                temperature=index % 2, seed=index, max_new_tokens=24, logprobs=1, ignore_eos=True
            ),
        )  # without an id: each gets its position
        for index in range(24)
    ]
    folder = checkpoint("gpt_oss")
    with Engine(folder, SMALL) as engine:
        expected = {each.request_id: each.token_ids for each in engine.generate(requests)}
    assert len({tuple(tokens) for tokens in expected.values()}) > 20
    for count in (1, 2, 4):
        cluster = Cluster(folder, folder, SMALL, replicas=count)
        done = list(cluster.generate(requests))
        cluster.close()
        assert {each.request_id: each.token_ids for each in done} == expected
        assert all(len(each.logprobs or ()) == 24 for each in done)
        assert sum(replica.requests for replica in cluster.replicas) == 24
        assert all(replica.requests for replica in cluster.replicas)
        assert cluster.stats.output_tokens == 24 * 24


class KilledOnce(Cluster):
    """Kills its first replica, or a rank of it, when the first results arrive."""

    def _handle_results(self, replica: ReplicaState, answer: bytes) -> list[Completion]:
        done = super()._handle_results(replica, answer)
        first = self.replicas[0]
        if done and not first.deaths and first.started is not None and first.generation == 1:
            pid = first.started.pid
            with contextlib.suppress(
                ProcessLookupError
            ):  # already dead, but its death is not noticed yet
                os.kill(pid if self.tensor_parallel == 1 else rank_of(pid), signal.SIGKILL)
        return done


def rank_of(pid: int) -> int:
    """The worker process of a replica with two ranks. Raises ProcessLookupError."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            if b"engine.parallel.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise ProcessLookupError


@pytest.mark.parametrize(
    ("ranks", "reason"), [(1, "replica 0 died"), (2, "rank 1 of 2 died: killed by signal 9")]
)
def test_a_replica_killed_during_a_job_changes_no_byte_and_duplicates_nothing(
    ranks: int,
    reason: str,
    one_ray: str,
    tmp_path: Path,
    expected: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    appended: list[int] = []
    append = Journal.append

    def counted(self: Journal, index: int, ok: bool, line: bytes) -> None:
        appended.append(index)
        append(self, index, ok, line)

    monkeypatch.setattr(Journal, "append", counted)
    work = job(tmp_path, mixed_requests(60))
    work = replace(work, report=str(tmp_path / "report.json"))
    cluster = KilledOnce(MODEL, MODEL, replace(SMALL, tensor_parallel=ranks), replicas=2)
    assert run(work, cluster) == SOME_FAILED
    cluster.close()
    assert Path(work.output).read_bytes() == expected
    assert sorted(appended) == list(range(60))
    first, second = json.loads((tmp_path / "report.json").read_text())["replicas"]
    assert first["deaths"] == 1
    assert first["requests_left_to_others"] > 0
    assert second["deaths"] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    done = report["requests_done"] + expected.count(b'"request_error"')
    assert first["requests"] + second["requests"] == done
    assert 0 < report["balance"] <= 1
    shown = capsys.readouterr().err
    assert "replica 0 died and is being restarted" in shown
    assert reason in shown
    assert "died once" in " ".join(shown.split())


class Interrupting(Cluster):
    """Sends SIGINT to itself when the first results arrive."""

    def _handle_results(self, replica: ReplicaState, answer: bytes) -> list[Completion]:
        done = super()._handle_results(replica, answer)
        if done and sum(each.requests for each in self.replicas) == len(done):
            os.kill(os.getpid(), signal.SIGINT)
        return done


def test_one_engine_resumes_a_job_that_replicas_started(
    one_ray: str, tmp_path: Path, expected: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    work = replace(job(tmp_path, mixed_requests(60)), grace_s=0.0)
    cluster = Interrupting(MODEL, MODEL, SMALL, replicas=2)
    with pytest.raises(Interrupted, match=r"\d+ of 60 requests are done and saved"):
        run(work, cluster)
    assert all(replica.actor is None for replica in cluster.replicas)
    cluster.close()
    assert run(work, one_engine()) == SOME_FAILED
    assert "resuming: " in capsys.readouterr().err
    assert Path(work.output).read_bytes() == expected


class FatalEngine(FakeEngine):
    """Exits its process at the prompt "5"."""

    def __init__(self, checkpoint: str, *_: Any, **__: Any) -> None:
        super().__init__()
        self.fatal = Tokenizer.load(checkpoint).encode("5")

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        for request in requests:
            if request is not None and request.prompt_ids == self.fatal:
                os._exit(1)
            if request is not None:
                yield self._complete(request)


def test_a_replica_that_keeps_dying_ends_the_job_and_names_the_requests(
    one_ray: str, tmp_path: Path
) -> None:
    work = job(tmp_path, [{"prompt": str(n)} for n in range(10)])
    made: Any = FatalEngine
    cluster = Cluster(MODEL, MODEL, EngineConfig(dtype="float32"), replicas=1, make_engine=made)
    with pytest.raises(
        GetpError, match=r"replica 0 died 3 times in a row.* while running requests 5 \("
    ):
        run(work, cluster)
    cluster.close()
    with open(f"{work.output}.journal", "rb") as journal:
        assert len(journal.readlines()) >= 1 + 3
    assert run(work, FakeEngine()) == 0
    assert len(Path(work.output).read_bytes().splitlines()) == 10


def test_a_failed_start_ends_the_job_with_the_error_of_the_engine(one_ray: str) -> None:
    cluster = Cluster(MODEL, MODEL, replace(SMALL, kv_memory=1), replicas=1)
    with pytest.raises(EngineError, match="kv_memory 1 means 1 bytes, which hold 0 blocks"):
        cluster.warm_up()
    cluster.close()


def test_a_server_streams_cancels_and_runs_batches_on_replicas(
    one_ray: str, tmp_path: Path
) -> None:
    cluster = Cluster(MODEL, MODEL, SMALL, replicas=2)
    server = RunningServer(tmp_path, engine=cluster)
    chat: Any = server.client.chat.completions
    asked = {"model": "embedded", "messages": MESSAGES, "temperature": 0, "logprobs": True}
    whole = chat.create(**asked)
    assert whole.choices[0].message.content == "42"
    choices = [chunk.choices[0] for chunk in chat.create(**asked, stream=True)]
    assert "".join(each.delta.content or "" for each in choices) == "42"
    entries = [entry for each in choices if each.logprobs for entry in each.logprobs.content]
    assert len(entries) == whole.usage.completion_tokens
    long: Any = {"max_tokens": 400, "extra_body": {"ignore_eos": True}, "n": 40}
    stream = server.client.completions.create(model="embedded", prompt="1", stream=True, **long)
    next(iter(stream))
    stream.close()  # more than run at once: some wait in the replicas, some here
    wait_until(lambda: server.metric("getp_online_requests") == 0)
    batch = start(server.client, lines(20))
    assert finished(server.client, batch).request_counts.completed == 20
    assert server.stop() == 0
    cluster.close()


def test_a_callback_that_cannot_be_sent_to_a_replica_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a StopWatcher"):
        request_message(Request([1, 2], on_token=lambda token: True))


@pytest.mark.parametrize("joined", [False, True])
def test_the_command_starts_ray_or_joins_a_running_cluster(
    one_ray: str, tmp_path: Path, joined: bool
) -> None:
    (tmp_path / "in.txt").write_text("3\nWhat is 1 plus 2?\nWhat is 2 plus 2?\nWhat is 3 plus 2?\n")
    files = ["-i", str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.txt")]
    given = ["--ray-address", one_ray, "--replicas", "1"] if joined else ["--replicas", "2"]
    done = subprocess.run(
        [sys.executable, "run.py", "-m", "getp", "--details", *files, *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.load(MODEL)
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert [tokenizer.decode(list(map(int, line.split()))) for line in lines] == ["3", "4", "5"]
    assert ("replica 1" in done.stderr) is not joined
    assert ray.is_initialized()
    assert ray.cluster_resources()["CPU"] == 2  # the cluster of the tests is still running


def run_job_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, *args: str
) -> tuple[int, str]:
    (tmp_path / "in.txt").write_text("1\na\n")
    files = ["-i", str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.txt")]
    return cli.run(["-m", "getp", *files, *args]), capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "many", ""])
def test_an_invalid_number_of_replicas_is_refused(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = run_job_command(capsys, tmp_path, "--replicas", value)
    assert status == 2
    assert f"{value!r} is neither a number from 1 to 99999 nor auto" in error
    assert "--replicas" in error


def test_an_address_without_replicas_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = run_job_command(capsys, tmp_path, "--ray-address", "auto")
    assert status == 2
    assert "--ray-address needs --replicas" in error


def test_impossible_splits_and_torchrun_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, error = run_job_command(capsys, tmp_path, "--replicas", "2", "--tensor-parallel", "4")
    assert status == 2
    assert "--tensor-parallel 4: this model (6 heads, 2 KV heads, 8 experts" in error
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, error = run_job_command(capsys, tmp_path, "--replicas", "2")
    assert status == 2
    assert "without torchrun" in error


def test_a_single_gpu_for_all_replicas_is_refused(
    one_ray: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = run_job_command(capsys, tmp_path, "--replicas", "2", "--device", "cuda:1")
    assert status == 2
    assert "--device cuda:1 with --replicas" in error


def test_the_error_without_ray_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    status, error = run_job_command(capsys, tmp_path, "--replicas", "2")
    assert status == 2
    assert "--replicas needs Ray, which is not installed: pip install 'getp[cluster]'" in error
