"""The dtype of the KV cache: results that do not depend on the batch, and refusals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Engine, EngineConfig, EngineError, Request, SamplingParams
from engine.resolve import resolve
from model import load_config
from model.ops.backend import Backend, KvDtypeError
from tests.engine.test_engine import run
from tests.test_end_to_end import DATA
from tokenizer import Tokenizer

_NEARLY_TIED = 2  # of 12 answers


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "fp8", "int8"])
def test_batching_chunking_caching_and_preemption_do_not_change_answers(kv_dtype: str) -> None:
    """In products of other shapes float32 rounds differently, which can move a stored value to the
    next step of its dtype, and change a token if two are nearly tied: in few answers of a trained
    model. Wrong slots or scales would change nearly all of them.
    """
    tokenizer = Tokenizer.load(DATA / "model")
    questions = (DATA / "input.txt").read_text(encoding="utf-8").split("\n")[1:13]
    params = SamplingParams(max_new_tokens=40, stop_ids=tokenizer.stop_ids)
    prompts = map(tokenizer.encode, questions)
    requests = [Request(prompt, params, i) for i, prompt in enumerate(prompts)]

    def answers(count: int = 1, **settings: Any) -> tuple[dict[int, Any], Engine]:
        return run(DATA / "model", requests * count, kv_dtype=kv_dtype, block_size=4, **settings)

    def changed(found: dict[int, Any]) -> int:
        return sum(found[i] != answer for i, answer in alone.items())

    alone, _ = answers(max_batch_size=1, prefix_cache=False)
    batched, engine = answers(prefix_cache=False)
    assert engine.stats.peak_batch == 12
    assert changed(batched) <= _NEARLY_TIED
    chunked, _ = answers(max_batch_tokens=13, prefix_cache=False)
    assert changed(chunked) <= _NEARLY_TIED
    cached, engine = answers(2)
    assert engine.stats.cached_tokens > 100
    assert changed(cached) <= _NEARLY_TIED
    block = engine.stats.kv_bytes // (engine.stats.kv_blocks + 1)
    longer = SamplingParams(max_new_tokens=40, ignore_eos=True)  # too long for the memory
    requests = [replace(request, params=longer) for request in requests]
    preempted, engine = answers(kv_memory=80 * block)
    assert engine.stats.preemptions > 0
    beginnings = {i: preempted[i][: len(answer)] for i, answer in alone.items()}
    assert changed(beginnings) <= _NEARLY_TIED


def test_the_same_memory_holds_more_tokens_in_8_bits(checkpoint: Callable[[str], Path]) -> None:
    folder, blocks = checkpoint("qwen3"), {}
    for kv_dtype in ("auto", "bfloat16", "fp8", "int8"):
        config = EngineConfig(dtype="float32", kv_dtype=kv_dtype, kv_memory=1 << 20)
        with Engine(folder, config) as engine:
            blocks[engine.kv_dtype] = engine.stats.kv_blocks + 1
    assert blocks["bfloat16"] // 2 == blocks["float32"] == blocks["fp8"] // 4
    assert blocks["bfloat16"] < blocks["int8"] < blocks["fp8"]


def test_a_dtype_that_the_device_lacks_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Path]
) -> None:
    def refuse(device: torch.device, dtype: torch.dtype, kv_dtype: str) -> Backend:
        raise KvDtypeError("gfx90a has no fp8")

    monkeypatch.setattr("engine.resolve.choose_backend", refuse)
    folder = checkpoint("qwen3")
    with pytest.raises(EngineError) as error:
        Engine(folder, EngineConfig(kv_dtype="fp8", device="cpu"))
    assert str(error.value) == (
        "kv_dtype fp8 is not possible here: gfx90a has no fp8; use kv_dtype auto"
    )
    monkeypatch.undo()
    assert resolve(EngineConfig(), load_config(folder)).model.kv_dtype == "auto"
