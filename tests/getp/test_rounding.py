"""Results that round differently are not mixed without a word: a job on other kernels, or hosts."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from engine import EngineConfig, SamplingParams
from engine.resolve import KERNEL_CHOICES, rounding
from getp.cluster.driver import Cluster
from getp.errors import GetpError
from getp.job import run as job_run
from getp.job.journal_header import ROUNDING, header_line, read_header
from getp.job.request_reader import RequestDefaults
from getp.job.run import Job
from getp.rounding import check_replica
from model.ops.backend import Backend, choose_backend
from model.ops.cpu.bindings import Kernels
from model.ops.cpu.bindings import library as native_library
from tests.getp.helpers import FakeEngine, small_tokenizer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
AMX: dict[str, object] = {"kernels": "native amx, bfloat16", "tensor_parallel": 1}
AVX2: dict[str, object] = {"kernels": "native avx2, 16-bit integers", "tensor_parallel": 1}
TWO_RANKS: dict[str, object] = {**AMX, "tensor_parallel": 2}


def job(tmp_path: Path, **changes: Any) -> Job:
    (tmp_path / "in.txt").write_text("4\na\nb\nc\nd\n")
    files = {"input": str(tmp_path / "in.txt"), "output": str(tmp_path / "out.txt")}
    defaults = RequestDefaults(SamplingParams())
    return Job(**{**files, "checkpoint": "small", "defaults": defaults, **changes})


def run(work: Job, kernels: dict[str, object], dtype: torch.dtype, stop_after: int = 9) -> int:
    answered = 0

    def answer(prompt: Any) -> Any:
        nonlocal answered
        answered += 1
        if answered > stop_after:
            raise RuntimeError("killed")
        return prompt

    engine: Any = FakeEngine(answer, batch=1)
    engine.rounding, engine.dtype = kernels, dtype
    return job_run.run_job(work, job_run.read(work), small_tokenizer(), engine)


def begin(work: Job, kernels: dict[str, object], dtype: torch.dtype, count: int = 2) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        run(work, kernels, dtype, count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("now", "words"),
    [
        (AVX2, r"kernels 'native amx, bfloat16', now 'native avx2, 16-bit integers'\. In "),
        (TWO_RANKS, r"started with tensor_parallel 1, now 2\. In "),
    ],
)
def test_other_rounding_is_refused_in_16_bits_with_both_values_unless_accepted(
    tmp_path: Path,
    dtype: torch.dtype,
    now: dict[str, object],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = job(tmp_path)
    begin(work, AMX, dtype)
    with pytest.raises(GetpError, match=words + r".*add accept_different_rounding to finish"):
        run(work, now, dtype)
    assert not Path(work.output).exists()
    accepting = replace(work, accept_different_rounding=True)
    with pytest.raises(RuntimeError, match="killed"):
        run(accepting, now, dtype, 1)
    assert "its results in " in capsys.readouterr().err
    with pytest.raises(GetpError, match=words):  # the journal still says how it was started
        run(work, now, dtype)
    assert run(work, AMX, dtype) == 0


def test_other_rounding_is_only_a_message_in_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = job(tmp_path)
    begin(work, AMX, torch.float32)
    assert run(work, AVX2, torch.float32) == 0
    shown = capsys.readouterr().err
    assert "kernels 'native amx, bfloat16', now 'native avx2, 16-bit integers': in float32" in shown
    begin(work, AMX, torch.float32)
    capsys.readouterr()
    assert run(work, AMX, torch.float32) == 0
    assert "kernels" not in capsys.readouterr().err


def test_journal_of_a_version_that_did_not_note_the_rounding_is_resumed(tmp_path: Path) -> None:
    work = job(tmp_path)
    begin(work, AMX, torch.bfloat16)
    journal = Path(work.journal_path)
    first, *rest = journal.read_bytes().splitlines(keepends=True)
    header = read_header(first)
    assert header is not None
    assert header.pop(ROUNDING)["kernels"] == AMX["kernels"]
    journal.write_bytes(b"".join([header_line(header), *rest]))
    assert run(work, AVX2, torch.bfloat16) == 0


def test_jobs_without_a_finished_request_or_with_all_of_them_do_not_depend_on_the_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = job(tmp_path)
    begin(work, AMX, torch.bfloat16, 0)
    begin(work, AVX2, torch.bfloat16, 1)  # its rounding replaces the other
    with pytest.raises(GetpError, match="native avx2"):
        run(work, AMX, torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr("getp.job.results._write", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(work, AVX2, torch.bfloat16)
    assert run(work, AMX, torch.bfloat16) == 0  # only writes the result


def test_results_do_not_depend_on_the_names_of_the_kernels(tmp_path: Path) -> None:
    work = job(tmp_path, output=str(tmp_path / "a.jsonl"))
    other = job(tmp_path, output=str(tmp_path / "b.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1750000000")
        run(work, AMX, torch.float32)
        run(other, AVX2, torch.float32)
    assert Path(work.output).read_bytes() == Path(other.output).read_bytes()


def test_replica_that_rounds_differently_is_refused_in_16_bits_unless_accepted() -> None:
    words = r"replica 1 has kernels 'native avx2.*', on the first replica 'native amx"
    with pytest.raises(GetpError, match=words):
        check_replica("replica 1", AMX, AVX2, torch.bfloat16, accepted=False)
    check_replica("replica 1", AMX, AVX2, torch.bfloat16, accepted=True)
    check_replica("replica 1", AMX, AVX2, torch.float32, accepted=False)
    check_replica("replica 1", AMX, dict(AMX), torch.bfloat16, accepted=False)


class OwnRounding(FakeEngine):
    """An engine that rounds differently in each process."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.rounding = {"kernels": f"of process {os.getpid()}"}


def test_replicas_on_unlike_hosts_are_refused_in_16_bits_unless_accepted() -> None:
    made: Any = OwnRounding
    model = ROOT / "data" / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        for dtype, accepted in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
            cluster = Cluster(
                model, model, EngineConfig(dtype=dtype), replicas=2, make_engine=made,
                accept_different_rounding=accepted,
            )  # fmt: skip
            try:
                assert cluster.rounding["kernels"].startswith("of process")
                if dtype == "bfloat16" and not accepted:
                    with pytest.raises(GetpError, match=r"replica \d on host .* has kernels"):
                        cluster.warm_up()
                else:
                    cluster.warm_up()
            finally:
                cluster.close()
    assert not ray.is_initialized()


def test_rounding_names_kernels_processor_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rounding(CPU, torch.float32, 2, {})
    assert found == json.loads(json.dumps(found))
    assert found["tensor_parallel"] == 2
    assert found["kernels"].startswith("torch on ")
    assert found["torch"].startswith(torch.__version__)
    assert Backend(CPU, torch.float32).kernels("EPYC") == "torch on EPYC"
    if native_library() is not None:
        name = choose_backend(CPU, torch.bfloat16).kernels("EPYC")
        assert name.startswith("native ")
        assert "EPYC" not in name  # the same on every processor of this level
    kernels = Kernels()
    names = set()
    for level, integers in (
        ("avx2", True),
        ("avx_vnni", True),
        ("vnni", True),
        ("avx512", False),
        ("amx", False),
    ):
        kernels.level, kernels.int16_weights = level, integers
        names.add(kernels.form)
    assert len(names) == 5
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    kernels.level, kernels.int16_weights = "avx2", False
    assert kernels.form == "portable (aarch64), bfloat16"


def test_rounding_on_a_gpu_names_triton_and_what_is_chosen_for_the_device() -> None:
    triton = pytest.importorskip("triton")
    from model.ops.triton.backend import TritonBackend
    from model.ops.triton.tiles import TILES, Target

    target = Target("sm_90", 132, TILES["sm_90"])
    name = TritonBackend(CPU, torch.bfloat16, target).kernels("NVIDIA H200")
    assert name == f"Triton {triton.__version__} on NVIDIA H200 (sm_90, 132 processors)"


def test_killed_job_is_not_finished_by_other_kernels(tmp_path: Path) -> None:
    """The real command: killed after some requests, then resumed without the native kernels."""
    if native_library() is None:
        pytest.skip("there are no native kernels here")
    lines = [json.dumps({"prompt": f"What is {n} plus 2?", "max_tokens": 4}) for n in range(30)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "{}", ""]))
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]

    def getp(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "run.py", "-m", "getp", *files, "--schedule", "first",
             "--max-batch-size", "4", *options],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    assert getp("--max-errors", "0").returncode == 1
    refused = getp(GETP_CPU_KERNELS="none")
    assert refused.returncode == 1
    assert "started with kernels 'native " in refused.stderr
    assert "', now 'torch on " in refused.stderr
    assert "add --accept-different-rounding to finish" in refused.stderr
    accepted = getp("--accept-different-rounding", GETP_CPU_KERNELS="none")
    assert accepted.returncode == 3
    assert "are a mixture of both" in accepted.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 31


class Choosing(FakeEngine):
    """An engine that would choose other kernels than those a journal names."""

    def __init__(self, own: dict[str, str], stop_after: int) -> None:
        left = iter(range(stop_after))

        def answer(prompt: Any) -> Any:
            if next(left, None) is None:
                raise RuntimeError("killed")
            return prompt

        super().__init__(answer, batch=1)
        self.own, self.dtype = own, torch.bfloat16

    def choose_kernels(self, preferred: Any = None, expected_s: Any = None) -> None:
        super().choose_kernels(preferred, expected_s)
        choices = self.own if preferred is None else preferred
        self.rounding = {**AMX, **({KERNEL_CHOICES: choices} if choices else {})}


@pytest.mark.parametrize("first", [{}, {"linear": "torch"}])
def test_a_resumed_job_takes_the_kernels_that_its_journal_names(
    tmp_path: Path, first: dict[str, str]
) -> None:
    work = job(tmp_path, expected_s=90.0)

    def start(engine: Choosing, work: Job = work) -> int:
        given: Any = engine
        return job_run.run_job(work, job_run.read(work), small_tokenizer(), given)

    with pytest.raises(RuntimeError, match="killed"):
        start(engine := Choosing(first, 2))
    assert (engine.preferred, engine.expected_s) == (None, 90.0)
    header = read_header(Path(work.journal_path).read_bytes().splitlines(keepends=True)[0])
    assert header is not None
    assert header[ROUNDING].get(KERNEL_CHOICES, {}) == first
    with pytest.raises(RuntimeError, match="killed"):
        start(engine := Choosing({"experts": "torch"}, 1))
    assert engine.preferred == first
    with pytest.raises(RuntimeError, match="killed"):
        start(engine := Choosing({"experts": "torch"}, 1), replace(work, restart=True))
    assert engine.preferred is None
    assert start(engine := Choosing({}, 9)) == 0
    assert engine.preferred == {"experts": "torch"}


def test_a_job_whose_kernels_are_wrong_here_is_refused_like_other_roundings(
    tmp_path: Path,
) -> None:
    work, other = job(tmp_path), {**AMX, KERNEL_CHOICES: {"experts": "torch"}}
    begin(work, AMX, torch.bfloat16)
    with pytest.raises(GetpError, match=r"kernel choices None, now .*experts"):
        run(work, other, torch.bfloat16)
