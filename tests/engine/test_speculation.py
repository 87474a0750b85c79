"""Speculation: drafts from the sequence's own text, which change the speed but not the result."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from engine import Completion, Engine, EngineConfig, Request, SamplingParams
from engine.scheduling.kv_cache import BlockTables
from engine.scheduling.sequence import Draft, Sequence, Step
from engine.scheduling.speculation import MAX_DRAFT_TOKENS, Lookup, Speculation
from engine.stats import EngineStats
from model.ops.cpu.bindings import library

PROMPT = random.Random(0).choices(range(3, 500), k=40) * 3


def complete(
    folder: Path, requests: list[Request], speculation: bool, **settings: Any
) -> tuple[list[Completion], EngineStats]:
    config = EngineConfig(speculation=speculation, **{"dtype": "float32", **settings})
    with Engine(folder, config) as engine:
        done = sorted(engine.generate(requests), key=lambda c: c.request_id)
        return done, engine.stats


def results(done: list[Completion]) -> list[Any]:
    return [(c.token_ids, c.finish_reason) for c in done]


def logprobs(done: list[Completion]) -> list[float]:
    return [logprob.logprob for c in done for logprob in c.logprobs or ()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt_oss-wide", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("limit", [1, 5])
def test_results_are_the_same_with_drafts(
    name: str, dtype: str, limit: int, checkpoint: Callable[[str], Path]
) -> None:
    """Greedy and sampled, with log-probabilities, alone and several, of different lengths."""
    params = [
        SamplingParams(max_new_tokens=60, ignore_eos=True),
        SamplingParams(max_new_tokens=33, ignore_eos=True, temperature=0.3, seed=5, top_p=0.8),
        SamplingParams(max_new_tokens=50, ignore_eos=True, logprobs=3),
        SamplingParams(max_new_tokens=1, ignore_eos=True),
    ]
    for chosen in (params[:1], params):
        requests = [Request(PROMPT[i:], p) for i, p in enumerate(chosen)]
        plain, _ = complete(checkpoint(name), requests, False, dtype=dtype)
        with patch.object(Speculation, "_best_limit", return_value=limit):
            drafted, stats = complete(checkpoint(name), requests, True, dtype=dtype)
        assert results(drafted) == results(plain)
        assert logprobs(drafted) == pytest.approx(logprobs(plain), abs=1e-2)
        assert (stats.draft_tokens > 0) == (dtype == "float32" or library() is not None)
        assert stats.output_tokens == sum(len(c.token_ids) for c in plain)


def test_there_are_no_drafts_where_the_results_of_a_row_depend_on_the_others(
    checkpoint: Callable[[str], Path],
) -> None:
    """As in 16 bits without native kernels, which do not take heads of 16 values."""
    requests = [Request(PROMPT, SamplingParams(max_new_tokens=60, ignore_eos=True))]
    for dtype, speculates in (("bfloat16", False), ("float32", True)):
        with patch.object(Speculation, "_best_limit", return_value=5):
            _, stats = complete(checkpoint("qwen2"), requests, True, dtype=dtype)
        assert (stats.draft_tokens > 0) == speculates


def test_a_stop_token_ends_a_request_among_accepted_tokens(
    checkpoint: Callable[[str], Path],
) -> None:
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    (whole,), _ = complete(checkpoint("qwen2"), [Request(PROMPT, params)], False)
    seen: dict[int, int] = {}
    for i, token in enumerate(whole.token_ids):
        seen.setdefault(token, i)
    for stop, first in seen.items():
        params = SamplingParams(max_new_tokens=60, ignore_eos=True, stop_ids=frozenset([stop]))
        (ended,), _ = complete(checkpoint("qwen2"), [Request(PROMPT, params)], True)
        assert ended.token_ids == whole.token_ids[: first + 1]
        assert ended.finish_reason == "stop"


def test_ranks_agree_on_drafts(checkpoint: Callable[[str], Path]) -> None:
    requests = [Request(PROMPT, SamplingParams(max_new_tokens=40, ignore_eos=True))]
    plain, _ = complete(checkpoint("qwen2"), requests, False, tensor_parallel=2)
    drafted, stats = complete(checkpoint("qwen2"), requests, True, tensor_parallel=2)
    assert results(drafted) == results(plain)
    assert stats.draft_tokens > 0


def test_a_draft_is_what_followed_the_longest_match() -> None:
    lookup = Lookup()
    tokens = [9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2]
    assert lookup.propose(tokens, 3) == [3, 8, 1]
    assert lookup.propose([*tokens, 7], 3) == []
    assert lookup.propose([*tokens, 7, 8, 1, 2], 2) == [4, 9]
    assert Lookup().propose([5], 3) == []
    assert Lookup().propose([5, 5], 3) == []
    assert Lookup().propose([5, 5, 5], 3) == [5]


def test_the_rate_follows_drafts_that_were_not_computed() -> None:
    right, wrong = Lookup(), Lookup()
    tokens = [1, 2, 3] * 3
    for _ in range(60):
        right.propose(tokens, 5)
        wrong.propose(tokens, 5)
        tokens.append(tokens[-3])
        wrong._draft = [99]
    assert right.rate > 0.95
    assert wrong.rate < 0.05


def test_drafts_are_computed_only_where_they_gain() -> None:
    speculation = Speculation(8)
    times = {1: 1.0, 2: 1.02, 4: 1.1, 8: 2.0, 16: 4.0}

    def limit(rate: float) -> int:
        lookup = Lookup()
        lookup.rate = rate
        sequence: Any = type("Sequence", (), {"lookup": lookup})()
        return speculation._best_limit([sequence], [[0] * 15])

    for rows, seconds in times.items():
        step: Any = Step(context_lens=[1] * rows)
        speculation.measured(step, seconds)
    assert limit(0.0) == 0
    assert limit(0.1) == 1  # 1.1 tokens in 1.02
    assert limit(0.9) in (3, 5)
    assert limit(0.01) == 0
    assert MAX_DRAFT_TOKENS == 15


def test_a_step_without_a_token_accepts_no_draft() -> None:
    """As where logits are not finite: the sequence then ends with the tokens that it had."""
    request = Request([5, 6, 5], SamplingParams())
    sequence = Sequence(request, [5, 6, 5], 9, frozenset(), BlockTables([]), 0.0)
    sequence.computed = 3
    speculation = Speculation(1)
    assert speculation.settle(Step(drafts=[Draft(sequence, [6, 5], 1)])) == 0
    assert sequence.computed == 2
