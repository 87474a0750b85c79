"""Longrope in a batch: the factors of a sequence depend on its own length alone.

The tokens of each request equal those of transformers, which recomputes a sequence with the long
factors when it grows beyond the original context (64 tokens here).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine import Engine, EngineConfig, Request, SamplingParams
from tests.checkpoints import Peer

NAME = "phi3-longrope"
LENGTHS = (3, 40, 63, 64, 65, 66, 100, 150)


def prompt(length: int) -> list[int]:
    return random.Random(length).choices(range(1, 512), k=length)


def requests(new_tokens: int = 30) -> Iterator[Request]:
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    return (Request(prompt(length), params, length) for length in LENGTHS)


def run(folder: Path, config: EngineConfig, requests: Iterator[Request]) -> dict[int, list[int]]:
    with Engine(folder, config) as engine:
        return {c.request_id: c.token_ids for c in engine.generate(requests)}


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path]) -> dict[int, list[int]]:
    """The tokens of each request when it runs alone."""
    config = EngineConfig(dtype="float32", kv_memory=16 << 20)
    found: dict[int, list[int]] = {}
    for request in requests():
        found |= run(checkpoint(NAME), config, iter([request]))
    return found


def test_sequences_equal_transformers_below_across_and_beyond_the_original_context(
    expected: dict[int, list[int]], peer: Callable[[str], Peer]
) -> None:
    for length, tokens in expected.items():
        assert len(tokens) == 30
        assert peer(NAME).is_greedy(prompt(length), tokens), length


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(max_batch_size=3),
        EngineConfig(max_batch_tokens=16),  # chunks
        EngineConfig(prefix_cache=False),
        EngineConfig(block_size=4),
    ],
    ids=["together", "three at a time", "chunks", "no prefix cache", "small blocks"],
)
def test_tokens_do_not_depend_on_the_batch(
    config: EngineConfig, checkpoint: Callable[[str], Path], expected: dict[int, list[int]]
) -> None:
    config = replace(config, dtype="float32", kv_memory=16 << 20)
    assert run(checkpoint(NAME), config, requests()) == expected


def test_tokens_do_not_depend_on_preemption(
    checkpoint: Callable[[str], Path], expected: dict[int, list[int]]
) -> None:
    config = EngineConfig(dtype="float32", block_size=16, kv_memory=20 * 16 * 4 * 2 * 2 * 16 * 4)
    with Engine(checkpoint(NAME), config) as engine:
        found = {c.request_id: c.token_ids for c in engine.generate(requests())}
        assert engine.stats.preemptions > 0
    assert found == expected


def test_a_prefix_with_other_factors_is_not_reused(
    checkpoint: Callable[[str], Path], expected: dict[int, list[int]]
) -> None:
    long = prompt(150)
    short = Request(long[:48], SamplingParams(max_new_tokens=4, ignore_eos=True), 0)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    with Engine(checkpoint(NAME), EngineConfig(dtype="float32", kv_memory=16 << 20)) as engine:
        (first,) = engine.generate([short])
        (second,) = engine.generate([Request(long, params, 150)])
        (third,) = engine.generate([Request(long, params, 151)])
        (fourth,) = engine.generate([short])
    assert second.cached_tokens == 0  # the cached keys are rotated by the short factors
    assert second.token_ids == third.token_ids == expected[150]
    assert third.cached_tokens == 144
    assert fourth.cached_tokens == 32
    assert first.token_ids == fourth.token_ids


def test_a_sequence_that_outgrows_the_original_context_is_not_counted_as_preempted(
    checkpoint: Callable[[str], Path],
) -> None:
    with Engine(checkpoint(NAME), EngineConfig(dtype="float32", kv_memory=16 << 20)) as engine:
        list(engine.generate(requests()))
        assert engine.stats.preemptions == 0
