"""EngineConfig, errors that name its settings, and the summary of a run."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import (
    Engine,
    EngineConfig,
    EngineError,
    Request,
    RequestError,
    RunSummary,
    SamplingParams,
)
from engine.resolve import resolve
from model.cost.known_models import named_config
from model.ops.backend import Backend


def option(name: str) -> str:
    return {"max_positions": "-n/--max-length"}.get(name, "--" + name.replace("_", "-"))


def test_a_config_cannot_be_changed_and_has_defaults_for_every_setting() -> None:
    config = EngineConfig()
    assert replace(config, block_size=8) == EngineConfig(block_size=8)
    with pytest.raises(FrozenInstanceError):
        config.block_size = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": torch.float32}, "dtype must be a string, not torch.float32"),
        ({"device": torch.device("cpu")}, "device must be a string, not device(type='cpu')"),
        ({"kv_memory": "4GiB"}, "kv_memory must be an integer, not '4GiB'"),
        ({"max_batch_size": 2.5}, "max_batch_size must be an integer, not 2.5"),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as raised:
        EngineConfig(**setting)
    assert str(raised.value) == message


def test_a_config_that_is_not_an_engine_config_is_refused() -> None:
    with pytest.raises(TypeError, match=r"config must be an EngineConfig, not \{'dtype'"):
        Engine("data/model", {"dtype": "float32"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "int4"}, "dtype must be auto, bfloat16, float16, float32, not 'int4'"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        ({"device": "cuda:x"}, "device must be auto, cpu, cuda or cuda:N, not 'cuda:x'"),
        ({"device": "cuda:01"}, "device must be auto, cpu, cuda or cuda:N, not 'cuda:01'"),
        ({"device": "cuda:128"}, "device must be auto, cpu, cuda or cuda:N, not 'cuda:128'"),
        ({"device": "cuda:\u0661"}, "device must be auto, cpu, cuda or cuda:N, not 'cuda:\u0661'"),
        ({"block_size": 0}, "block_size must be 1 or more, not 0"),
        ({"max_batch_size": 0}, "max_batch_size must be 1 or more, not 0"),
        ({"max_batch_tokens": -1}, "max_batch_tokens must be 1 or more, not -1"),
        ({"tensor_parallel": 0}, "tensor_parallel must be 1 or more, not 0"),
    ],
)
def test_a_setting_out_of_range_is_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError) as raised:
        EngineConfig(**setting)
    assert str(raised.value) == message
    (name,) = setting
    assert raised.value.worded(option) == message.replace(name, option(name), 1)


def test_settings_left_open_are_chosen_for_the_device_and_the_model() -> None:
    dense, sparse = named_config("llama-3-8b"), named_config("gpt-oss-20b")
    found = resolve(EngineConfig(device="cpu"), dense)
    assert (found.max_batch_size, found.max_batch_tokens) == (64, 512)
    assert resolve(EngineConfig(device="cpu"), sparse).max_batch_tokens == 1024
    assert found.dtype == torch.bfloat16
    # float16 is slow on CPUs: it is used only if it is asked for.
    half = replace(dense, dtype="float16")
    assert resolve(EngineConfig(device="cpu"), half).dtype == torch.bfloat16
    assert resolve(EngineConfig(device="cpu", dtype="float16"), half).dtype == torch.float16
    given = resolve(EngineConfig(device="cpu", max_batch_size=3, max_batch_tokens=5), dense)
    assert (given.max_batch_size, given.max_batch_tokens) == (3, 5)


@pytest.mark.parametrize(
    ("gigabytes", "given", "size", "tokens"),
    [
        (24, {}, 256, 8192),
        (141, {}, 1024, 16384),
        (141, {"max_batch_size": 300}, 300, 8192),
        (141, {"max_batch_tokens": 2048}, 1024, 2048),
        (24, {"max_batch_size": 2000, "max_batch_tokens": 99}, 2000, 99),
    ],
)
def test_the_batch_on_a_gpu_follows_from_its_memory_unless_it_is_given(
    gigabytes: int,
    given: dict[str, Any],
    size: int,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    properties = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("engine.resolve.choose_backend", Backend)
    found = resolve(EngineConfig(device="cuda", **given), named_config("llama-3-8b"))
    assert (found.max_batch_size, found.max_batch_tokens) == (size, tokens)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_does_not_exist_is_refused() -> None:
    with pytest.raises(EngineError, match="device cuda does not exist: torch finds 0 GPUs"):
        resolve(EngineConfig(device="cuda"), named_config("llama-3-8b"))


def test_an_error_fills_in_values_and_lets_the_caller_name_settings() -> None:
    cause = EngineError("lower {kv_memory} below {limit}", limit="2GiB")
    error = RequestError("rank {rank}: {cause}", rank=3, cause=cause)
    assert str(error) == "rank 3: lower kv_memory below 2GiB"
    assert error.worded(option) == "rank 3: lower --kv-memory below 2GiB"
    assert error.template() == "rank 3: lower {kv_memory} below 2GiB"
    assert EngineError("the config has {'a': 1} in it").worded(option).endswith("{'a': 1} in it")


def test_errors_survive_pickling() -> None:
    error = RequestError("{length} tokens: lower {max_positions}", length=7)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is RequestError
    assert copy.worded(option) == "7 tokens: lower -n/--max-length"
    assert copy.fields == {"length": 7}


@pytest.mark.parametrize(
    ("parameter", "value"), [("temperature", -1), ("max_positions", 0), ("logprobs", 21)]
)
def test_a_sampling_parameter_out_of_range_can_be_renamed(parameter: str, value: int) -> None:
    with pytest.raises(EngineError) as raised:
        SamplingParams(**{parameter: value})  # type: ignore[arg-type]
    assert str(raised.value).startswith(f"{parameter} must be ")
    assert raised.value.worded(option).startswith(f"{option(parameter)} must be ")


def test_a_summary_says_what_ran_and_outlives_the_engine(
    checkpoint: Callable[[str], Path],
) -> None:
    config = EngineConfig(device="cpu", dtype="float32", kv_memory=8 << 20, max_batch_size=3)
    with Engine(checkpoint("qwen2"), config) as engine:
        list(engine.generate([Request([1, 2, 3], SamplingParams(max_new_tokens=4))]))
    summary = engine.summary()
    expected = RunSummary(
        device="cpu",
        device_type="cpu",
        device_count=1,
        dtype="float32",
        tensor_parallel=1,
        max_batch_size=3,
        config=engine.held_config,
        stats=engine.stats,
        peak_memory_bytes=summary.peak_memory_bytes,
    )
    assert summary == expected
    assert summary.peak_memory_bytes > 10 << 20
    assert summary.stats.output_tokens == 4
    assert pickle.loads(pickle.dumps(summary)) == summary


def test_requests_and_configs_are_imported_without_torch() -> None:
    program = (
        "import sys; from engine import EngineConfig, Request, RunSummary, SamplingParams; "
        "assert 'torch' not in sys.modules; "
        "from engine import Engine; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
