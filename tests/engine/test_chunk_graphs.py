"""Captured steps with chunks, padded in both of their sizes, give the same tokens as computed ones.

The captured steps consist of torch's operations, replayed one by one on fixed tensors, so that
every length and offset must come from a tensor.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.execution import chunk_graphs, model_runner
from engine.execution.chunk_graphs import ChunkGraphs, chunk_token_sizes, single_token_sizes
from engine.scheduling.kv_cache import NULL_BLOCK
from model.ops.forward_batch import ForwardBatch
from tests.engine.captures import Taping, TensorLengths
from tests.engine.test_engine import load

Tokens = dict[Any, Any]


def tokens_of(
    folder: Path, requests: list[Request], captures: list[int] | None, **settings: Any
) -> tuple[Tokens, Engine, Counter[bool]]:
    """The tokens, and how many steps with chunks were replayed; None: nothing is captured."""
    given = {"dtype": "float32", "kv_memory": 8 << 20, "max_batch_size": 6, **settings}
    engine = Engine(folder, EngineConfig(**given), notice=pytest.fail)
    replayed = Counter[bool]()

    def taping(stats: Any) -> Taping:
        return Taping()

    engine.make_capture = None if captures is None else taping
    original = ChunkGraphs.__call__

    def noted(self: ChunkGraphs, batch: ForwardBatch) -> torch.Tensor | None:
        logits = original(self, batch)
        replayed[logits is not None] += 1
        return logits

    with pytest.MonkeyPatch.context() as patch, engine:
        patch.setattr(ChunkGraphs, "__call__", noted)
        for cache in engine.runner.kv_caches:
            cache[:, 1:] = float("nan")
        found = {c.request_id: c.token_ids for c in engine.generate(requests)}
        assert all(not cache[:, NULL_BLOCK].any() for cache in engine.runner.kv_caches)
        return found, engine, replayed


@pytest.mark.parametrize(
    ("settings", "is_full"),
    [
        ({"max_batch_tokens": 100}, True),
        ({"max_batch_tokens": 64, "prefix_cache": False}, True),
        ({"max_batch_tokens": 300, "kv_memory": 1 << 18}, False),
    ],
    ids=["chunks, cached prefixes", "chunks", "few blocks, larger steps"],
)
@pytest.mark.parametrize("name", ["qwen2-window-yarn", "phi3-longrope"])
def test_replayed_steps_with_chunks_give_the_same_tokens(
    name: str,
    settings: dict[str, Any],
    is_full: bool,
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_runner, "choose_backend", TensorLengths)
    if not is_full:
        monkeypatch.setattr(chunk_graphs, "_CHUNK_TOKENS", (64, 128))
    requests = load(longest=15)
    requests += [Request([9], SamplingParams(max_new_tokens=3, ignore_eos=True), 100)]
    expected, _, replayed = tokens_of(checkpoint(name), requests, None, **settings)
    assert not replayed
    found, engine, replayed = tokens_of(checkpoint(name), requests, [], **settings)
    assert found == expected
    assert replayed[True] > 2
    assert is_full == (not replayed[False])
    if settings.get("prefix_cache", True) and is_full:
        assert engine.stats.cached_tokens > 0


def test_chunk_sizes_are_few_and_padding_is_small() -> None:
    assert chunk_token_sizes(0) == []
    assert chunk_token_sizes(50) == [50]
    assert chunk_token_sizes(300) == [64, 128, 256, 300]
    assert len(chunk_token_sizes(10**6)) == 7
    assert single_token_sizes(6) == [6]
    assert single_token_sizes(100) == [16, 64, 100]
    assert single_token_sizes(1024) == [16, 64, 256, 1024]
