"""Decode steps at fixed sizes give the same results: padding harms nobody.

In place of a GPU's graphs stands a function that computes over the same buffers again.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Engine
from engine.graphs import Capture, Compute, sizes
from engine.kv_cache import NULL_BLOCK
from model.batch import ForwardBatch
from tests.test_engine import load


class FromTensors:
    """A model that takes every length from the batch's tensors, as kernels of a graph do."""

    def __init__(self, model: Any):
        self._model = model

    def __call__(self, batch: ForwardBatch, *rest: Any) -> torch.Tensor:
        fresh = replace(
            batch,
            query_lens=batch.query_starts.diff().tolist(),
            context_lens=batch.seen.tolist(),
            groups=tuple(replace(group, plan=None) for group in batch.groups),
        )
        logits: torch.Tensor = self._model(fresh, *rest)
        return logits


def recording(replays: Counter[int]) -> Capture:
    """Captures that count how often each size is replayed."""

    def capture(compute: Compute) -> Compute:
        size = len(compute())  # as a GPU's capture, which runs it before

        def replay() -> torch.Tensor:
            replays[size] += 1
            return compute()

        return replay

    return capture


def test_sizes_are_few_and_reach_the_largest() -> None:
    assert sizes(1) == [1]
    assert sizes(3) == [1, 2, 3]
    assert sizes(8) == [1, 2, 4, 8]
    assert sizes(20) == [1, 2, 4, 8, 16, 20]
    assert sizes(256) == [1, 2, 4, *range(8, 257, 8)]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("name", ["gpt_oss", "qwen2-window-yarn", "qwen3_moe"])
def test_steps_replayed_at_fixed_sizes_give_the_same_tokens(
    name: str, ahead: int, checkpoint: Callable[[str], Path]
) -> None:
    requests = load()
    settings: dict[str, Any] = {"dtype": "float32", "kv_memory": 32 << 20, "max_batch_size": 10}
    with Engine(checkpoint(name), **settings) as engine:
        expected = {c.request_id: c.token_ids for c in engine.generate(requests)}
    with Engine(checkpoint(name), **settings) as engine:
        runner, replays = engine._runner, Counter[int]()
        engine._ahead = ahead
        runner._model = FromTensors(runner._model)  # type: ignore[assignment]
        runner.capture(recording(replays))
        for cache in runner._caches:
            cache[:, 1:] = float("nan")
        found = {c.request_id: c.token_ids for c in engine.generate(requests)}
        assert all(not cache[:, NULL_BLOCK].any() for cache in runner._caches)
    assert found == expected
    assert runner._graphs is None
    assert len(replays) >= 4
    assert sum(replays.values()) > 50
    assert set(replays) <= {1, 2, 4, 8, 10}


def test_the_largest_step_can_be_run_and_leaves_nothing(checkpoint: Callable[[str], Path]) -> None:
    with Engine(checkpoint("gpt_oss"), dtype="float32", kv_memory=32 << 20) as engine:
        runner = engine._runner
        rows: list[torch.Size] = []
        model: Any = runner._model

        def watched(batch: ForwardBatch, *rest: Any) -> torch.Tensor:
            assert batch.token_ids.shape == (64 * (300 // 64),)
            rows.append(model(batch, *rest).shape)
            return torch.zeros(rows[-1])

        watched.prepare_rope = model.prepare_rope  # type: ignore[attr-defined]
        runner._model = watched  # type: ignore[assignment]
        runner.run_largest(64, 300, 200, 16)
        assert rows == [(64, engine.config.vocab_size)]
        assert not runner._caches
        assert runner._sampler is None
