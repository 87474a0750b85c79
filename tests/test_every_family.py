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
from tokenizer import Tokenizer

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

    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\n"))
    assert getp(folder, "-m", "chat", *OPTIONS) == 0
    assert "tok/s" in capsys.readouterr().err

    prompts, output = tmp_path / "in.txt", tmp_path / "out.txt"
    texts = [f"{'the quick ' * n}fox" for n in range(1, 5)]
    prompts.write_text("4\n" + "".join(f"{text}\n" for text in texts))
    job = (folder, "-m", "getp", "-i", prompts, "-o", output, *OPTIONS, "--max-batch-size", 2)
    generate = Engine.generate

    def break_off(self: Engine, *args: Any, **options: Any) -> Iterator[Completion]:
        for i, completion in enumerate(generate(self, *args, **options)):
            if i == 2:
                raise Broken("of a job")
            yield completion

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", break_off)
        assert getp(*job) == 1
    assert not output.exists()
    capsys.readouterr()
    assert getp(*job) == 0
    assert "of 4 requests are done already" in capsys.readouterr().err
    tokenizer = Tokenizer.load(folder)
    alone = tokens(folder, [tokenizer.encode(text) for text in texts], 4)
    assert output.read_text() == "".join(f"{' '.join(map(str, ids))}\n" for ids in alone)


def tokens(
    folder: Path, prompts: list[list[int]], count: int, workers: WorkerPool | None = None
) -> list[list[int]]:
    """The first `count` tokens after each prompt."""
    params = SamplingParams(max_new_tokens=count, ignore_eos=True)
    config = EngineConfig(dtype="float32", kv_memory=8 << 20)
    with Engine(folder, config, workers=workers) as engine:
        requests = [Request(ids, params, i) for i, ids in enumerate(prompts)]
        done = {c.request_id: c.token_ids for c in engine.generate(requests)}
    return [done[i] for i in range(len(prompts))]


# Families whose norms of queries and keys span all heads, which therefore stay together.
UNSPLIT = ("minimax_m2", "olmo2", "olmo3", "olmoe")
# The text model of a nested checkpoint is split as that of its family.
SPLIT = [CHECKPOINTS[name] for name in TEXT_FAMILIES if name in CHECKPOINTS.keys() - {*UNSPLIT}]


@pytest.mark.parametrize("name", SPLIT)
def test_two_ranks_of_a_family_give_the_tokens_of_one(
    name: str, checkpoint: Callable[[str], Path], workers: WorkerPool
) -> None:
    folder, prompts = checkpoint(name), [[1] * 30, [2] * 30]
    check_tensor_parallel(load_config(folder), 2)
    assert tokens(folder, prompts, 6, workers) == tokens(folder, prompts, 6)
