"""A checkpoint of every family answers, chats, runs jobs, resumes them and is split over ranks.

Whether the answers are right is tested in `tests/model/test_parity.py`.
"""

import io
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import Completion, Engine, EngineConfig, Request, SamplingParams
from engine.parallel.worker_pool import WorkerPool
from getp.cli import main
from model import load_config
from model.cost.operations import check_tensor_parallel
from model.families import FAMILIES as TEXT_FAMILIES
from model.families import family
from model.families.nested import NESTED
from tests.checkpoints import FAMILIES
from tests.getp.helpers import write_tokenizer

# Of several checkpoints of a family, the one whose sizes the native kernels take.
CHECKPOINTS = {
    name.partition("-")[0]: name
    for name in sorted(FAMILIES, key=lambda name: name.endswith("-wide"))
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
OPTIONS = ("--max-new-tokens", 4, "--kv-memory", "8MiB", "--dtype", "float32", "--ignore-eos")


class Broken(Exception):
    """What ends the first run of a job."""


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    """Two ranks, which all tests share."""
    pool = WorkerPool(2)
    yield pool
    pool.close()


def getp(*args: object) -> int:
    return main.run([str(arg) for arg in args])


def test_there_is_a_checkpoint_of_every_family() -> None:
    assert family("kimi_k2") is family("deepseek_v3")  # which has one
    assert CHECKPOINTS.keys() | {"kimi_k2"} == {*TEXT_FAMILIES, *NESTED}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_family_generates_chats_and_resumes_a_job(
    name: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(checkpoint(CHECKPOINTS[name]), tmp_path / "model")
    write_tokenizer(folder, f"{TEMPLATE}{name}:")
    assert getp(folder, "-m", "generate", "-i", "What is 12 + 34?", *OPTIONS) == 0
    err = capsys.readouterr().err
    assert "[4 tokens" in err
    assert "using the model's chat template" in err

    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\nbrown fox\n"))
    assert getp(folder, "-m", "chat", *OPTIONS) == 0
    assert capsys.readouterr().err.count("tok/s") == 2

    prompts, output = tmp_path / "in.txt", tmp_path / "out.txt"
    prompts.write_text("6\n" + "".join(f"{'the quick ' * n}fox\n" for n in range(1, 7)))
    job = (folder, "-m", "getp", "-i", prompts, "-o", output, *OPTIONS, "--max-batch-size", 2)
    assert getp(*job) == 0
    expected = output.read_bytes()
    assert len(expected.splitlines()) == 6

    generate = Engine.generate

    def break_off(self: Engine, *args: Any, **options: Any) -> Iterator[Completion]:
        for i, completion in enumerate(generate(self, *args, **options)):
            if i == 3:
                raise Broken("of a job")
            yield completion

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", break_off)
        assert getp(*job, "--restart") == 1
    capsys.readouterr()
    assert getp(*job) == 0
    assert "of 6 requests are done already" in capsys.readouterr().err
    assert output.read_bytes() == expected


# Families whose norms of queries and keys span all heads, which therefore stay together.
UNSPLIT = ("minimax_m2", "olmo2", "olmo3", "olmoe")
# Of hybrids, the checkpoint with experts has enough heads in its recurrent layers.
SPLIT = [name for name in CHECKPOINTS.values() if name not in (*UNSPLIT, "qwen3_5_text")]


@pytest.mark.parametrize("name", SPLIT)
def test_two_ranks_of_a_family_give_the_tokens_of_one(
    name: str, checkpoint: Callable[[str], Path], workers: WorkerPool
) -> None:
    folder = checkpoint(name)
    check_tensor_parallel(load_config(folder), 2)
    requests = [
        Request([i + 1] * 30, SamplingParams(max_new_tokens=6, ignore_eos=True), i)
        for i in range(2)
    ]
    config = EngineConfig(dtype="float32", kv_memory=8 << 20)

    def tokens(workers: WorkerPool | None) -> dict[int, list[int]]:
        with Engine(folder, config, workers=workers) as engine:
            return {c.request_id: c.token_ids for c in engine.generate(requests)}

    assert tokens(workers) == tokens(None)
