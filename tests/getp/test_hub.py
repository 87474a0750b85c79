"""Checkpoints by name, from a local stand-in for the Hugging Face Hub.

huggingface_hub reads its settings when it is imported, so that each test runs the command line in a
process of its own.
"""

import errno
import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from getp.errors import GetpError
from getp.hub import find_checkpoint, model_name
from tests.getp.hub_server import Hub, running_hub

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "data" / "model"
NAME = "some-org/Tiny-1.0"
SMALL = {
    path.name for path in MODEL.iterdir() if path.suffix in (".json", ".jinja")
}  # config, tokenizer and template


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as running:
        yield running


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The embedded model beside files that getp does not need."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors",
                 "onnx/model.onnx", "README.md", "tokenizer.model", "tf_model.h5"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    return folder


def shard(folder: Path) -> set[str]:
    """Split the weights of a model into two files with an index; return their names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {
        name: f"model-0000{n % 2 + 1}-of-00002.safetensors" for n, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return set(weight_map.values())


def getp(
    hub: Hub, tmp_path: Path, *args: object, stderr: int = subprocess.PIPE, **env: str
) -> "subprocess.CompletedProcess[str]":
    """Run the command line with the hub and a cache in the test's folder."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *map(str, args)],
        cwd=tmp_path,
        env={**kept, **settings, **env},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("sharded", [False, True])
def test_model_is_downloaded_once_and_then_found_in_the_cache(
    hub: Hub, model: Path, tmp_path: Path, sharded: bool
) -> None:
    weights = shard(model) | {"model.safetensors.index.json"} if sharded else {"model.safetensors"}
    hub.upload(NAME, model)
    question = ["-i", "What is 17 plus 25?"]
    run = getp(hub, tmp_path, NAME, "-m", "generate", *question)
    assert (run.returncode, run.stdout) == (0, "42\n"), run.stderr
    assert sorted(hub.downloads) == sorted(SMALL | weights)
    assert f"getp: downloading {NAME} (" in run.stderr
    assert "%|" not in run.stderr  # no progress bars in a file
    seen = hub.requests
    name, offline = NAME, "0"
    if sharded:
        name, offline = f"{NAME}@{hub.repositories[NAME].commit}", "1"
    run = getp(hub, tmp_path, name, "-m", "generate", *question, HF_HUB_OFFLINE=offline)
    assert (run.returncode, run.stdout) == (0, "42\n"), run.stderr
    assert "downloading" not in run.stderr
    assert hub.requests == seen


def test_download_shows_its_progress_on_a_terminal(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.upload(NAME, model)
    (tmp_path / "ids.txt").write_text("5 6\n")
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    done = getp(hub, tmp_path, NAME, "-m", "decode", "-i", "ids.txt", stderr=stderr)
    os.close(stderr)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert done.returncode == 0, shown
    assert "100%|" in shown, shown


def test_each_mode_downloads_only_what_it_needs(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.upload(NAME, model)
    plan = getp(hub, tmp_path, NAME, "-m", "plan", "--gpu", "H100", "--format", "json")
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["model"] == NAME
    assert hub.downloads == ["config.json"]
    (tmp_path / "ids.txt").write_text("5 6\n")
    decode = getp(hub, tmp_path, NAME, "-m", "decode", "-i", "ids.txt")
    assert decode.returncode == 0, decode.stderr
    assert sorted(hub.downloads) == sorted(SMALL)
    (tmp_path / "in.txt").write_text("1\nWhat is 17 plus 25?\n")
    files = ["-i", "in.txt", "-o", "out.jsonl", "--report", "report.json"]
    job = getp(hub, tmp_path, NAME, "-m", "getp", *files)
    assert job.returncode == 0, job.stderr
    assert sorted(hub.downloads) == sorted(SMALL | {"model.safetensors"})
    assert json.loads((tmp_path / "report.json").read_text())["checkpoint"] == NAME
    assert json.loads((tmp_path / "out.jsonl").read_text())["response"]["body"]["model"] == NAME


def test_tokenizer_can_be_named(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.upload(NAME, model)
    (tmp_path / "ids.txt").write_text("5 6\n")
    run = getp(hub, tmp_path, "-z", NAME, "-m", "decode", "-i", "ids.txt")
    assert run.returncode == 0, run.stderr
    assert sorted(hub.downloads) == sorted(SMALL)


def test_interrupted_download_is_completed(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.upload(NAME, model)
    assert getp(hub, tmp_path, NAME, "-i", "What is 1 plus 2?").stdout == "3\n"
    (weights,) = (tmp_path / "hf" / "hub").glob("models--*/snapshots/*/model.safetensors")
    weights.resolve().unlink()
    weights.unlink()
    assert getp(hub, tmp_path, NAME, "-i", "What is 1 plus 2?").stdout == "3\n"
    assert hub.downloads.count("model.safetensors") == 2
    assert hub.downloads.count("config.json") == 1


def test_cache_with_only_some_of_the_files_is_completed(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    """Such as those of a program that used only the tokenizer, and no listing of the model."""
    hub.upload(NAME, model)
    (tmp_path / "ids.txt").write_text("5 6\n")
    decode = ["-m", "decode", "-i", "ids.txt"]
    assert getp(hub, tmp_path, NAME, *decode).returncode == 0
    (cache,) = (tmp_path / "hf" / "hub").glob("models--*")
    shutil.rmtree(cache / "trees", ignore_errors=True)
    (config,) = cache.glob("snapshots/*/config.json")
    config.unlink()
    assert getp(hub, tmp_path, NAME, *decode).returncode == 0
    assert config.exists()


def test_unsupported_model_is_refused_before_its_weights_are_downloaded(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    (model / "config.json").write_text('{"model_type": "mamba"}')
    hub.upload(NAME, model)
    run = getp(hub, tmp_path, NAME, "-i", "hi")
    assert run.returncode == 1
    assert "'mamba'" in run.stderr
    assert "model.safetensors" not in hub.downloads


def last_line(run: "subprocess.CompletedProcess[str]", status: int = 1) -> str:
    lines = [line for line in run.stderr.splitlines() if line.startswith("getp: error: ")]
    assert (run.returncode, len(lines)) == (status, 1), run.stderr
    assert "Traceback" not in run.stderr
    return lines[0]


def test_error_of_a_name_that_the_hub_does_not_have(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.upload(NAME, model)
    error = last_line(getp(hub, tmp_path, "models/qwen", "-i", "hi"))
    assert f"models/qwen is neither a directory here nor a model on {hub.url}; for a priv" in error
    error = last_line(getp(hub, tmp_path, f"{NAME}@v9", "-i", "hi"))
    assert f"{NAME} has no revision 'v9': {hub.url}/{NAME} lists" in error


@pytest.mark.parametrize("status", [401, 403])
def test_error_of_a_gated_model_says_how_to_get_access(
    hub: Hub, model: Path, tmp_path: Path, status: int
) -> None:
    hub.upload(NAME, model, gated=status)
    error = last_line(getp(hub, tmp_path, NAME, "-i", "hi"))
    assert f"accept them on {hub.url}/{NAME}, then log in with `hf auth login`" in error


def test_errors_without_a_network_say_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    error = last_line(getp(hub, tmp_path, NAME, "-i", "hi", HF_HUB_OFFLINE="1"))
    assert f"{NAME} is neither a directory here nor complete in the local cache " in error
    assert "HF_HUB_OFFLINE is set: unset it" in error
    assert not hub.requests
    nowhere = "http://127.0.0.1:9"
    error = last_line(getp(hub, tmp_path, NAME, "-i", "hi", HF_ENDPOINT=nowhere))
    assert f"complete in the local cache {tmp_path}/hf/hub, and cannot be downloaded" in error
    assert f"from {nowhere}: " in error


def test_plan_of_an_unknown_name_names_the_closest_known_models(hub: Hub, tmp_path: Path) -> None:
    run = getp(hub, tmp_path, "Qwen/Qwen3-0.7B", "-m", "plan")
    assert run.returncode == 2
    assert "'Qwen/Qwen3-0.7B'; did you mean qwen3-1.7b, qwen3-0.6b" in run.stderr
    assert "for a private model log in" in run.stderr  # why it was not downloaded


def test_download_that_does_not_fit_on_the_disk_is_refused(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    hub.upload(NAME, model).sizes["model.safetensors"] = 10**18
    error = last_line(getp(hub, tmp_path, NAME, "-i", "hi"))
    assert "needs 888.18 PiB in " in error
    assert "left; make room, or set HF_HOME to a folder on another disk" in error
    assert "model.safetensors" not in hub.downloads


def test_error_names_a_disk_that_fills_up_during_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(*args: object, **rest: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fill_up)
    monkeypatch.setattr("huggingface_hub.utils.disable_progress_bars", lambda: None)
    with pytest.raises(
        GetpError, match=f"the disk is full: {NAME} does not fit in {tmp_path}; make"
    ):
        find_checkpoint(NAME)


def test_model_without_safetensors_is_refused(hub: Hub, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    hub.upload(NAME, model)
    error = last_line(getp(hub, tmp_path, NAME, "-i", "hi"))
    assert f"{NAME} on {hub.url} has no weights in the format safetensors" in error


def test_directory_comes_before_a_name(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / NAME)
    assert getp(hub, tmp_path, NAME, "-i", "What is 17 plus 25?").stdout == "42\n"
    assert not hub.requests


@pytest.mark.parametrize(
    ("text", "is_name"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("openai/gpt-oss-20b@main", True),
        ("a/b@refs/pr/1", True),
        ("gpt-oss-20b", False),
        ("./models/qwen", False),
        ("/models/qwen", False),
        ("~/models", False),
        ("a/b/c", False),
        ("../x", False),
        ("models/qwen--v2", False),
        ("a/" + 100 * "b", False),
        ("What is 4/2?", False),
    ],
)
def test_names_are_told_from_paths(
    text: str, is_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getp.hub._Repository", None)  # calling it raises TypeError
    if is_name:
        with pytest.raises(TypeError):
            find_checkpoint(text)
    else:
        assert find_checkpoint(text) == Path(text)


def test_name_of_a_directory_in_the_cache_is_that_of_the_model(tmp_path: Path) -> None:
    assert model_name(tmp_path / "models--Qwen--Qwen3-0.6B/snapshots/c1899d") == "Qwen/Qwen3-0.6B"
    assert model_name(tmp_path / "Qwen3-0.6B") == "Qwen3-0.6B"
