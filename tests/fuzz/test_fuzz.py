"""Any bytes give a result or a clear error, never another exception, never a hang.

`HYPOTHESIS_PROFILE=long pytest tests/fuzz/test_fuzz.py` runs many more examples than `make test`.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import CheckpointError, Transformer, load_config, loader
from model.families import parse_config
from model.formats import QUANTIZATIONS
from model.gguf import read_gguf
from tests.adapters import random_lora, write_adapter
from tests.fuzz.targets import (
    MODEL,
    TARGETS,
    VALID_RECORD,
    checkpoint_copy,
    gguf_file,
    header_of,
    index_of,
    read_all,
    safetensors_header,
    safetensors_index,
)
from tests.gguf_files import write_gguf
from tests.quantized_checkpoints import Encoder, fp8_blocks, gptq, is_linear, write_quantized

_SLOW_DISK = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile(
    "check", max_examples=60, deadline=60_000, suppress_health_check=_SLOW_DISK, derandomize=True
)
settings.register_profile(
    "long", max_examples=2000, deadline=60_000, suppress_health_check=_SLOW_DISK
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
odd_values = values | st.sampled_from(["POST", "/v1/completions", {"prompt": "x"}, 1, "hi"])
records = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), odd_values, max_size=6)


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes of a valid file, some of them replaced, removed or repeated."""
    data = valid
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        end = min(len(data), at + draw(st.integers(0, 9)))
        data = data[:at] + draw(st.binary(max_size=6) | st.just(data[at:end] * 2)) + data[end:]
    return data


@pytest.mark.parametrize("name", TARGETS)
@given(st.data())
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path, data: st.DataObject) -> None:
    target = TARGETS[name]
    target.use(tmp_path, data.draw(st.binary(max_size=60) | damaged(target.valid)))


@given(records, records)
def test_jsonl_with_unexpected_fields_is_read_or_refused(
    tmp_path: Path, record: Any, body: Any
) -> None:
    lines = [
        record,
        {**VALID_RECORD, "body": body},
        {**VALID_RECORD, **record},
        {**body, "prompt": "x"},
    ]
    lines.append({**VALID_RECORD, "custom_id": "b", "body": {**VALID_RECORD["body"], **body}})  # type: ignore[dict-item]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read_all(tmp_path / "in.jsonl")


@pytest.fixture
def copied(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint_copy(checkpoint("qwen2"), tmp_path / "copy")


@given(st.data())
def test_damaged_safetensors_header_is_read_or_refused(copied: Path, data: st.DataObject) -> None:
    safetensors_header(copied, data.draw(damaged(header_of(copied))))


_PACKED: dict[str, tuple[dict[str, Any], Encoder]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, gptq(4, 32)),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [40, 24]}, fp8_blocks(40, 24)),
}


@pytest.mark.parametrize("name", _PACKED)
@given(st.data())
def test_damaged_quantized_checkpoints_are_read_or_refused(
    name: str, tmp_path: Path, checkpoint: Callable[[str], Path], data: st.DataObject
) -> None:
    folder, (quantization, encoder) = tmp_path / "quantized", _PACKED[name]
    if not folder.exists():
        write_quantized(
            checkpoint("qwen2"), folder, tmp_path / "dense", quantization,
            lambda module: encoder if is_linear(module) else None,
        )  # fmt: skip
        checkpoint_copy(folder, tmp_path / "copy")
    copy = tmp_path / "copy"
    safetensors_header(copy, data.draw(damaged(header_of(copy))))


_SETTINGS = (
    "activation_scheme fmt weight_block_size modules_to_not_convert kv_cache_scheme bits "
    "group_size desc_act dynamic checkpoint_format version zero_point quant_algo ignore "
    "config_groups format targets weights num_bits type strategy symmetric block_structure "
    "actorder sparsity_config modules_in_block_to_quantize input_activations"
).split()
settings_of = st.recursive(
    values | st.sampled_from(["group", "float", "pack-quantized", "re:.*", "Linear", 4, 8, 32]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(_SETTINGS), inner, max_size=6
    ),
    max_leaves=12,
)  # fmt: skip


@given(st.sampled_from([*QUANTIZATIONS]), st.dictionaries(st.sampled_from(_SETTINGS), settings_of))
def test_unexpected_settings_of_a_quantization_are_read_or_refused(
    method: str, chosen: dict[str, Any]
) -> None:
    config = {**MODEL, "quantization_config": {**chosen, "quant_method": method}}
    with contextlib.suppress(CheckpointError):
        parse_config(config, "config.json")


@pytest.fixture
def adapted(tmp_path: Path, checkpoint: Callable[[str], Path]) -> tuple[Path, Transformer, Path]:
    """A checkpoint, its model and an adapter of it."""
    source = checkpoint("qwen2")
    tensors = random_lora(source, "model.layers.1.self_attn.q_proj")
    return source, Transformer(load_config(source)), write_adapter(tmp_path / "valid", tensors)


@given(st.data())
def test_damaged_adapters_are_read_or_refused(
    tmp_path: Path, adapted: tuple[Path, Transformer, Path], data: st.DataObject
) -> None:
    (tmp_path / "adapter").mkdir(exist_ok=True)
    source, model, valid = adapted
    for file in valid.iterdir():
        (tmp_path / "adapter" / file.name).write_bytes(data.draw(damaged(file.read_bytes())))
    with contextlib.suppress(CheckpointError):
        loader.check(model, source, [(str(tmp_path / "adapter"), 1.0)])


@given(st.data())
def test_damaged_safetensors_index_is_read_or_refused(copied: Path, data: st.DataObject) -> None:
    safetensors_index(copied, data.draw(damaged(index_of(header_of(copied)))))


@pytest.fixture
def gguf_bytes(tmp_path: Path, checkpoint: Callable[[str], Path]) -> bytes:
    return write_gguf(checkpoint("qwen2"), tmp_path / "valid.gguf").read_bytes()


@given(st.data())
def test_damaged_gguf_file_is_read_or_refused(
    tmp_path: Path, gguf_bytes: bytes, data: st.DataObject
) -> None:
    header = (
        len(gguf_bytes)
        - sum(  # of the tensors
            tensor.row_bytes * math.prod(tensor.shape[:-1])
            for tensor in read_gguf(tmp_path / "valid.gguf").tensors.values()
        )
    )
    gguf_file(tmp_path, data.draw(damaged(gguf_bytes[:header])) + gguf_bytes[header:])
