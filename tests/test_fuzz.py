"""Whatever the bytes: a clear error of ours or a result, never another exception, never a hang.

`HYPOTHESIS_PROFILE=long pytest tests/test_fuzz.py` tries much more than the check does.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import SamplingParams
from getp.errors import GetpError
from getp.files import read_token_file, writing
from getp.inputs import scan
from getp.journal import Journal
from getp.tasks import Defaults, Failure, Task, TaskReader
from model import CheckpointError, Transformer, load_config, weights
from tests.getp_helpers import CHAT_TEMPLATE, byte_level, small_tokenizer, write_tokenizer
from tokenizer import ChatTemplate, Tokenizer, TokenizerError

TOKENIZER = small_tokenizer()
_SLOW_DISK = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile(
    "check", max_examples=60, deadline=5000, suppress_health_check=_SLOW_DISK, derandomize=True
)
settings.register_profile(
    "long", max_examples=2000, deadline=5000, suppress_health_check=_SLOW_DISK
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "check"))

values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = (
    "custom_id id method url body model prompt messages max_tokens temperature top_p top_k seed "
    "stop logprobs top_logprobs n stream tools response_format chat_template_kwargs role content"
).split()
GOOD = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
}
odd_values = values | st.sampled_from(["POST", "/v1/completions", {"prompt": "x"}, 1, "hi"])
records = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), odd_values, max_size=6)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes of a good file, some of them replaced, removed or doubled."""
    data = good
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        end = min(len(data), at + draw(st.integers(0, 9)))
        data = data[:at] + draw(st.binary(max_size=6) | st.just(data[at:end] * 2)) + data[end:]
    return data


def read_all(path: Path) -> None:
    try:
        source = scan(str(path))
        reader = TaskReader(source, Defaults(SamplingParams()), TOKENIZER)
        tasks = [reader.read(line) for line in source.lines()]
    except GetpError:
        return
    assert len(tasks) == source.total
    assert all(isinstance(task, (Task, Failure)) for task in tasks)
    internal = [t for t in tasks if isinstance(t, Failure) and t.code == "internal_error"]
    assert not internal, internal


@given(st.binary(max_size=60) | damaged(b"3\none\n\xe4\xbd\xa0\nthree\n"))
def test_numbered_text(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "in.txt").write_bytes(data)
    read_all(tmp_path / "in.txt")


@given(damaged((json.dumps(GOOD) + "\n").encode() * 2))
def test_damaged_jsonl(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(data)
    read_all(tmp_path / "in.jsonl")


@given(records, records)
def test_jsonl_with_odd_fields(tmp_path: Path, record: Any, body: Any) -> None:
    lines = [record, {**GOOD, "body": body}, {**GOOD, **record}, {**body, "prompt": "x"}]
    lines.append({**GOOD, "custom_id": "b", "body": {**GOOD["body"], **body}})  # type: ignore[dict-item]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read_all(tmp_path / "in.jsonl")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@given(st.data())
def test_damaged_packed_files(suffix: str, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / f"in.jsonl.{suffix}"
    with writing(str(path)) as file:
        file.write((json.dumps(GOOD) + "\n").encode() * 5)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    read_all(path)


@given(st.binary(max_size=40) | damaged(b"1 2 3\n\n44 5\n"))
def test_token_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokens").write_bytes(data)
    _refused_at_most(lambda: read_token_file(str(tmp_path / "tokens")), GetpError)


@given(st.data())
def test_journals(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "journal"
    path.unlink(missing_ok=True)
    header = {"fingerprint": {"a": 1}}
    with Journal(str(path), header, 5) as journal:
        for index in range(4):
            journal.append(index, index != 2, b"%d %d" % (index, index))
    path.write_bytes(data.draw(damaged(path.read_bytes())))

    def open_again() -> None:
        with Journal(str(path), header, 5) as journal:
            for index in range(5):
                if index in journal:
                    assert journal.read(index) == (index != 2, b"%d %d" % (index, index))

    _refused_at_most(open_again, GetpError)


@given(st.binary(max_size=40) | damaged(byte_level().to_str().encode()))
def test_tokenizer_files(tmp_path: Path, data: bytes) -> None:
    folder = write_tokenizer(tmp_path / "t")
    (folder / "tokenizer.json").write_bytes(data)

    def use() -> None:
        Tokenizer.load(folder).encode("hello 你")

    _refused_at_most(use, TokenizerError)


@given(damaged(b'{"bos_token": "<bos>", "chat_template": [{"name": "default", "template": "x"}]}'))
def test_tokenizer_config(tmp_path: Path, data: bytes) -> None:
    folder = write_tokenizer(tmp_path / "t", template=None)
    (folder / "tokenizer_config.json").write_bytes(data)
    _refused_at_most(lambda: Tokenizer.load(folder), TokenizerError)


@given(damaged(CHAT_TEMPLATE.encode()))
def test_chat_templates(data: bytes) -> None:
    source = data.decode("utf-8", "replace")
    messages = [{"role": "user", "content": "hi"}]
    _refused_at_most(lambda: ChatTemplate(source).render(messages), TokenizerError)


@given(st.data())
def test_config_json(
    tmp_path: Path, checkpoint: Callable[[str], Path], data: st.DataObject
) -> None:
    good = (checkpoint("gpt_oss") / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(data.draw(damaged(good)))
    _refused_at_most(lambda: load_config(tmp_path), CheckpointError)


@given(st.data())
def test_safetensors_and_their_index(
    tmp_path: Path, checkpoint: Callable[[str], Path], data: st.DataObject
) -> None:
    good = checkpoint("qwen2")
    shard, index = tmp_path / "a.safetensors", tmp_path / "model.safetensors.index.json"
    whole = (good / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    names = [name for name in json.loads(whole[8:header]) if name != "__metadata__"]
    map_ = json.dumps({"weight_map": dict.fromkeys(names, shard.name)}).encode()
    in_index = data.draw(st.booleans())
    index.write_bytes(data.draw(damaged(map_)) if in_index else map_)
    shard.write_bytes(whole if in_index else data.draw(damaged(whole[:header])) + whole[header:])
    config = load_config(good)

    def load() -> None:
        weights.load(Transformer(config), tmp_path, torch.float32, torch.device("cpu"))

    _refused_at_most(load, CheckpointError)


def _refused_at_most(step: Callable[[], object], error: type[Exception]) -> None:
    try:
        step()
    except error as refusal:
        assert str(refusal)  # noqa: PT017 - it may also not be refused
