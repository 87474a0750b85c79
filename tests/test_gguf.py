"""Jobs with a model in one GGUF file, through the command line."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from getp import fingerprint
from getp.checkpoints import load_tokenizer
from getp.cli.main import run
from model.ops.mxfp4 import dequantize_mxfp4
from tests.checkpoints import edit_config
from tests.gguf_files import write_gguf
from tests.test_end_to_end import DATA, getp, share_correct
from tokenizer import Tokenizer


def _kind(name: str, values: object) -> Kind:
    return Kind.MXFP4 if "_exps.weight" in name else Kind.BF16 if ".weight" in name else Kind.F32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a GGUF file, with experts in MXFP4."""
    folder = tmp_path_factory.mktemp("embedded")
    tensors = load_file(DATA / "model" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        blocks, scales = tensors.pop(name), tensors.pop(f"{stem}_scales")
        tensors[stem] = dequantize_mxfp4(blocks, scales, torch.float32).transpose(-1, -2)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((DATA / "model" / name).read_bytes())
    edit_config(folder, quantization_config=None)
    return write_gguf(folder, folder / "embedded.gguf", _kind)


def test_a_job_with_it_answers_95_percent_of_the_questions_correctly(
    model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.txt"
    getp(model, "-m", "getp", "-i", DATA / "input.txt", "-o", output, "-z", DATA / "model")
    assert share_correct(output, tmp_path) >= 0.95


def test_it_answers_in_a_chat_template_and_stops(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    body = {"messages": [{"role": "user", "content": "12 + 34 ="}], "max_tokens": 30}
    record = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    getp(model, "-m", "getp", "-i", "-", "-o", output, stdin=json.dumps(record) + "\n")
    choice = json.loads(output.read_text())["response"]["body"]["choices"][0]
    assert choice["finish_reason"] == "stop"


def test_its_tokenizer_is_that_of_the_directory_but_for_the_named_division(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "expected"
    shutil.copytree(DATA / "model", folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.pre_tokenizer = Sequence([Digits(True), ByteLevel(False)])  # SmolLM's own
    backend.save(str(folder / "tokenizer.json"))
    found, expected = load_tokenizer(model), Tokenizer.load(folder)
    for line in (DATA / "input.txt").read_text().splitlines()[1:]:
        ids = expected.encode(line)
        assert found.encode(line) == ids
        assert found.decode(ids, skip_special=False) == line
    assert found.special_ids == expected.special_ids
    assert found.stop_ids == expected.stop_ids
    messages = [{"role": "user", "content": "hello"}]
    assert found.template is not None
    assert expected.template is not None
    assert found.template.render(messages) == expected.template.render(messages)


def test_every_byte_counts_for_its_fingerprint(model: Path, tmp_path: Path) -> None:
    data, other = bytearray(model.read_bytes()), tmp_path / model.name
    other.write_bytes(data)
    assert fingerprint.of_checkpoint(other) == fingerprint.of_checkpoint(model)
    assert fingerprint.of_tokenizer(other) == fingerprint.of_tokenizer(model)
    data[-1] ^= 1
    other.write_bytes(data)
    assert fingerprint.of_checkpoint(other) != fingerprint.of_checkpoint(model)


def test_plan_knows_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(model), "-m", "plan", "--gpu", "H100 SXM"]) == 0
    assert "embedded.gguf" in capsys.readouterr().out


def test_a_damaged_file_is_one_line_on_stderr(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(model.read_bytes()[:-100])
    assert run([str(damaged), "-i", "hello"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged.gguf: is truncated" in line
