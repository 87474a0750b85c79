"""Whatever a checkpoint directory contains, reading it ends soon, with one clear error.

Its files may be pipes, devices or links to them, and its config may contain any number.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from engine import Engine, EngineConfig
from getp import fingerprint
from getp.analysis.lookup import find_model
from model import CheckpointError, load_config
from model.cost.known_models import KNOWN_CONFIGS
from model.cost.operations import parameter_bytes
from tests.checkpoints import edit_config, write_checkpoint
from tests.getp.helpers import write_tokenizer
from tokenizer import Tokenizer, TokenizerError

ROOT = Path(__file__).resolve().parent.parent
MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "shard.safetensors",
    "unused.safetensors",
]
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _socket(path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as opened:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path must be short
        try:
            opened.bind(path.name)
        finally:
            os.chdir(here)


def _link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def _link(path: Path, target: str) -> None:
    path.symlink_to(target)


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "link to a pipe": _link_to_pipe,
    "link to /dev/zero": partial(_link, target="/dev/zero"),
    "link to a terminal": partial(_link, target="/dev/tty"),
    "link to nothing": partial(_link, target="missing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "directory": os.mkdir,
    "socket": _socket,
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose index lists one file."""
    folder = write_checkpoint(tmp_path_factory.mktemp("valid"), "qwen3")
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    from safetensors import safe_open

    with safe_open(folder / "shard.safetensors", framework="pt") as opened:
        names = dict.fromkeys(opened.keys(), "shard.safetensors")
    index = {"weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return write_tokenizer(folder)


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint."""
    return Path(shutil.copytree(valid, tmp_path / "model"))


def read_everything(folder: Path) -> None:
    """Read what a job reads."""
    Tokenizer.load(folder)
    fingerprint.of_tokenizer(folder)
    load_config(folder)
    fingerprint.of_checkpoint(folder)
    with Engine(folder, EngineConfig(device="cpu", kv_memory=1 << 24)):
        pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODEL_FILES + TOKENIZER_FILES)
def test_what_is_not_a_regular_file_is_refused(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink(missing_ok=True)
    KINDS[kind](folder / name)
    with within(5), pytest.raises((CheckpointError, TokenizerError)) as caught:
        read_everything(folder)
    assert str(folder / name) in str(caught.value)
    assert "not a regular file" in str(caught.value)


def test_links_to_regular_files_are_read(folder: Path, tmp_path: Path) -> None:
    for name in [path.name for path in folder.iterdir()]:
        (folder / name).rename(tmp_path / name)  # as in the cache of huggingface_hub
        (folder / name).symlink_to(f"../{name}")
    read_everything(folder)


@pytest.mark.parametrize("name", TOKENIZER_FILES + [n for n in MODEL_FILES if "json" in n])
def test_files_that_are_too_large_are_not_read(folder: Path, name: str) -> None:
    with open(folder / name, "wb") as file:
        file.truncate(1 << 40)
    with within(5), pytest.raises((CheckpointError, TokenizerError)) as caught:
        read_everything(folder)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("name", ["shard.safetensors", "tokenizer.json", "config.json"])
def test_a_command_ends_with_one_error(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    (tmp_path / "in.txt").write_text("1\nhi\n")
    files = ["-i", str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.txt")]
    done = subprocess.run(
        [sys.executable, "run.py", str(folder), "-m", "getp", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "not a regular file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_of_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with within(5), pytest.raises(CheckpointError, match="not a regular file"):
        find_model(tmp_path / "config.json")


SIZES = (
    "num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_size "
    "intermediate_size vocab_size num_experts moe_intermediate_size"
).split()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("experts"), "qwen3_moe")
    edit_config(folder, num_experts=6, num_local_experts=None, layer_types=None)
    return folder


@pytest.mark.parametrize("value", [10**7 * 2, 2**31 - 2, 2**31, 10**30, 10**4000])
@pytest.mark.parametrize("key", SIZES)
def test_absurd_numbers_are_refused(experts: Path, tmp_path: Path, key: str, value: int) -> None:
    folder = Path(shutil.copytree(experts, tmp_path / "model"))
    edit_config(folder, **{key: value})
    for use in (
        lambda: Engine(folder, EngineConfig(device="cpu")).warm_up(),
        lambda: Engine(folder, EngineConfig(device="cpu", dummy_weights=True)).warm_up(),
        lambda: find_model(folder),
        lambda: find_model(folder / "config.json"),
    ):
        with within(2), pytest.raises(CheckpointError, match=f"'{key}' must be an integer") as e:
            use()
        assert len(str(e.value)) < 400


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": 1024}, "requires 1024 layers with 6 experts, but only 95 tensors"),
        ({"num_experts": 4096}, "requires 4 layers with 4096 experts, but only 95 tensors"),
        ({"num_hidden_layers": 5}, r"'model\.layers\.4\.[^']*' of shape \[.*\] is missing"),
        ({"vocab_size": 1 << 24}, "has shape .* but config.json requires"),
        ({"hidden_size": 1 << 20}, "has shape .* but config.json requires"),
        ({"moe_intermediate_size": 1 << 20}, "has shape .* but config.json requires"),
        ({"num_attention_heads": 1 << 14}, "has shape .* but config.json requires"),
    ],
)
def test_a_config_is_compared_with_the_weights_before_memory_is_planned(
    experts: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    folder = Path(shutil.copytree(experts, tmp_path / "model"))
    edit_config(folder, **changes)
    with within(3), pytest.raises(CheckpointError, match=problem):
        Engine(folder, EngineConfig(device="cpu")).warm_up()


def test_the_largest_plan_is_quick(tmp_path: Path) -> None:
    config = {**KNOWN_CONFIGS["gpt-oss-20b"], "num_hidden_layers": 1024, "num_local_experts": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with within(2):
        model = find_model(tmp_path)
        assert parameter_bytes(model.config, "bfloat16") > 1 << 40


def test_ctrl_c_ends_a_job_whose_chat_template_hangs(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "data" / "model", tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(
        "{{ (messages | length) | round(30000000, 'floor') }}"
    )
    files = ["-i", "data/input.txt", "-o", str(tmp_path / "out.txt"), "--chat-template"]
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import run"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; run.main()", str(folder), "-m", "getp", *files],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers: list[int] = []
    deadline = time.monotonic() + 60
    while not any(_seconds_of_work(pid) > 1 for pid in workers):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        workers = [int(pid) for task in tasks for pid in task.read_text().split()]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "0 of 300 requests are done" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def _seconds_of_work(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")
