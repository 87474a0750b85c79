"""Fuzz targets: each takes a working folder and the bytes of a file, valid or not.

A target may return, or raise one of getp's errors; any other exception, or a hang, is a bug.
"""

import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import zstandard

from engine import SamplingParams
from getp.checkpoints import load_tokenizer
from getp.errors import GetpError
from getp.job.formats.interface import Failure, JobRequest
from getp.job.inputs import scan
from getp.job.journal import Journal
from getp.job.request_reader import RequestDefaults, RequestReader
from getp.text.result_file import read_results
from model import CheckpointError, Transformer, load_config, loader
from model.ops.backend import choose_backend
from tests.getp.helpers import CHAT_TEMPLATE, byte_level, small_tokenizer, write_tokenizer
from tokenizer import ChatTemplate, Tokenizer, TokenizerError

TOKENIZER = small_tokenizer()
VALID_RECORD = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
}
_LINES = (json.dumps(VALID_RECORD) + "\n").encode() * 2
_HEADER = {"fingerprint": {"a": 1}}
MODEL = {  # small, so that damaged variants of it are small as well
    "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 20,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "eos_token_id": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "original_max_position_embeddings": 64, "truncate": False,
    },
}  # fmt: skip


_QUANTIZATION = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False,
    }}},
}  # fmt: skip


class Target(NamedTuple):
    """The bytes of a valid file, and the function that reads it."""

    valid: bytes
    use: Callable[[Path, bytes], None]


def read_all(path: Path) -> None:
    """Read a job's input to its end; no request may fail with an internal error."""
    try:
        source = scan(str(path))
        reader = RequestReader(source, RequestDefaults(SamplingParams()), TOKENIZER)
        requests = [reader.read(line) for line in source.lines()]
    except GetpError:
        return
    assert len(requests) == source.total
    assert all(isinstance(request, (JobRequest, Failure)) for request in requests)
    internal = [t for t in requests if isinstance(t, Failure) and t.code == "internal_error"]
    assert not internal, internal


def input_named(name: str) -> Callable[[Path, bytes], None]:
    """Return a function that reads the bytes as a job's input of that name."""

    def use(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        read_all(folder / name)

    return use


def result_file(folder: Path, data: bytes) -> None:
    """Read a file of results: token ids or JSONL."""
    (folder / "results").write_bytes(data)
    _may_raise(lambda: read_results(str(folder / "results")), GetpError)


def journal_file(folder: Path, data: bytes) -> None:
    """Open a journal and read its records; records with the right checksum are trusted."""
    (folder / "journal").write_bytes(data)

    def open_again() -> None:
        with Journal(str(folder / "journal"), _HEADER, range(5)) as journal:
            for index in range(5):
                if index in journal:
                    journal.read(index)

    _may_raise(open_again, GetpError)


def tokenizer_file(folder: Path, data: bytes) -> None:
    """Load a tokenizer.json and encode."""
    _with_tokenizer(folder, "tokenizer.json", data)


def tokenizer_config(folder: Path, data: bytes) -> None:
    """Load a tokenizer_config.json."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _with_tokenizer(folder, "tokenizer_config.json", data)


def _with_tokenizer(folder: Path, name: str, data: bytes) -> None:
    if not (folder / "tokenizer.json").exists() or name == "tokenizer.json":
        write_tokenizer(folder, template=None)
    (folder / name).write_bytes(data)

    def use() -> None:
        Tokenizer.load(folder).encode("hello 你")

    _may_raise(use, TokenizerError)


def chat_template(folder: Path, data: bytes) -> None:
    """Compile and render a chat template."""
    source = data.decode("utf-8", "replace")
    messages = [{"role": "user", "content": "hi"}]
    _may_raise(lambda: ChatTemplate(source).render(messages), TokenizerError)


def config_json(folder: Path, data: bytes) -> None:
    """Read a model's config."""
    (folder / "config.json").write_bytes(data)
    _may_raise(lambda: load_config(folder), CheckpointError)


def safetensors_header(folder: Path, data: bytes) -> None:
    """Load a checkpoint whose only file has these bytes as its header, length included."""
    header, whole = _shard(folder)
    (folder / "a.safetensors").write_bytes(data + whole[header:])
    (folder / _INDEX).write_bytes(index_of(whole[:header]))
    _load(folder)


def safetensors_index(folder: Path, data: bytes) -> None:
    """Load a checkpoint with this index of its files."""
    (folder / "a.safetensors").write_bytes(_shard(folder)[1])
    (folder / _INDEX).write_bytes(data)
    _load(folder)


def gguf_file(folder: Path, data: bytes) -> None:
    """Read everything that is in a GGUF file."""
    path = folder / "model.gguf"
    path.write_bytes(data)

    def read() -> None:
        config, backend = load_config(path), choose_backend(torch.device("cpu"), torch.float32)
        loader.load(Transformer(config.held(backend)), path, backend)

    _may_raise(read, CheckpointError)
    with suppress(CheckpointError):
        _may_raise(lambda: load_tokenizer(path).encode("hello 你"), TokenizerError)


_INDEX = "model.safetensors.index.json"


def checkpoint_copy(checkpoint: Path, folder: Path) -> Path:
    """Prepare a folder for the two targets above, from a checkpoint of one file."""
    folder.mkdir(exist_ok=True)
    shutil.copy(checkpoint / "config.json", folder)
    shutil.copy(checkpoint / "model.safetensors", folder / "valid.safetensors")
    return folder


def _shard(folder: Path) -> tuple[int, bytes]:
    """Return where the header of the valid file in `folder` ends, and the file."""
    whole = (folder / "valid.safetensors").read_bytes()
    return 8 + int.from_bytes(whole[:8], "little"), whole


def header_of(folder: Path) -> bytes:
    """Return the valid header of the checkpoint in `folder`."""
    header, whole = _shard(folder)
    return whole[:header]


def index_of(header: bytes) -> bytes:
    """Return an index that maps every tensor of a header to one file."""
    names = [name for name in json.loads(header[8:]) if name != "__metadata__"]
    return json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}).encode()


def _load(folder: Path) -> None:
    config = load_config(folder)

    def load() -> None:
        backend = choose_backend(torch.device("cpu"), torch.float32)
        loader.load(Transformer(config.held(backend)), folder, backend)

    _may_raise(load, CheckpointError)


def _may_raise(step: Callable[[], object], error: type[Exception]) -> None:
    try:
        step()
    except error as refusal:
        assert str(refusal)  # noqa: PT017 - it may also not be refused


def _valid_journal() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        with Journal(str(path), _HEADER, range(5)) as journal:
            for index in range(4):
                journal.append(index, index != 2, b"%d %d" % (index, index))
        return path.read_bytes()


TARGETS = {
    "text": Target(b"3\none\n\xe4\xbd\xa0\nthree\n", input_named("in.txt")),
    "jsonl": Target(_LINES, input_named("in.jsonl")),
    "gzip": Target(gzip.compress(_LINES), input_named("in.jsonl.gz")),
    "zstd": Target(zstandard.compress(_LINES), input_named("in.jsonl.zst")),
    "tokens": Target(b"1 2 3\n\n44 5\n", result_file),
    "results": Target(
        b'{"response":{"body":{"choices":[{"message":{"content":"4"}}]}},"error":null}\n'
        b'{"response":null,"error":{"message":"the prompt is empty"}}\n',
        result_file,
    ),
    "journal": Target(_valid_journal(), journal_file),
    "tokenizer": Target(byte_level().to_str().encode(), tokenizer_file),
    "tokenizer-config": Target(
        b'{"bos_token": "<bos>", "chat_template": [{"name": "default", "template": "x"}]}',
        tokenizer_config,
    ),
    "template": Target(CHAT_TEMPLATE.encode(), chat_template),
    "config": Target(json.dumps(MODEL).encode(), config_json),
    "quantization": Target(
        json.dumps({**MODEL, "quantization_config": _QUANTIZATION}).encode(), config_json
    ),
}
