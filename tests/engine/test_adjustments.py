"""Penalties, biases, min-p, bad words and thinking budgets: what requests change about logits."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from engine import (
    Completion,
    Engine,
    EngineConfig,
    EngineError,
    Request,
    SamplingParams,
    ThinkingBudget,
)
from engine.execution import model_runner
from engine.scheduling.speculation import Speculation
from engine.scheduling.thinking import Thinking
from model.ops.cpu.backend import CpuBackend
from tests.engine.captures import Taping, TensorLengths

_COMMON: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True}
PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
PARAMS = [
    SamplingParams(**_COMMON, repetition_penalty=1.4, presence_penalty=0.5),
    SamplingParams(**_COMMON, temperature=0.8, seed=3, frequency_penalty=-0.7, min_p=0.05),
    SamplingParams(**_COMMON),
    SamplingParams(
        **_COMMON,
        temperature=0.9,
        seed=5,
        logit_bias={9: 11.0, 11: 10.5},
        bad_words=((11, 9), (9, 9, 11)),
    ),
    SamplingParams(
        **_COMMON, logit_bias={8: 100}, stop_ids=frozenset([8]), min_new_tokens=6, logprobs=1
    ),
]


def reference(logits: list[float], prompt: list[int], output: list[int], p: Any) -> list[float]:
    """The logits before temperature, by the formulas of the documents, token by token."""
    for token, bias in p.bias:
        logits[token] += bias
    for *start, token in p.bad_words:
        if not start or output[-len(start) :] == start:
            logits[token] = -math.inf
    if len(output) < p.min_new_tokens:
        for token in p.stop_ids:
            logits[token] = -math.inf
    for token in {*prompt, *output}:
        is_positive = logits[token] > 0
        logits[token] *= 1 / p.repetition_penalty if is_positive else p.repetition_penalty
    for token, count in Counter(output).items():
        logits[token] -= p.frequency_penalty * count + p.presence_penalty
    if p.min_p:
        least = max(logits) + p.temperature * math.log(p.min_p)
        logits = [value if value >= least else -math.inf for value in logits]
    return logits


def complete(
    folder: Path, params: list[SamplingParams], **settings: Any
) -> tuple[list[Completion], Engine]:
    """The completions of one prompt with each of the parameters, all at once."""
    config = EngineConfig(**{"dtype": "float32", "kv_memory": 8 << 20, **settings})
    with Engine(folder, config) as engine:
        requests = [Request(PROMPT, each) for each in params]
        return sorted(engine.generate(requests), key=lambda c: c.request_id), engine


def results(done: list[Completion]) -> list[Any]:
    return [(c.token_ids, c.finish_reason) for c in done]


@pytest.mark.parametrize("number", [0, 1, 3, 4])
def test_logits_are_changed_as_the_documents_say(
    number: int, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, steps = PARAMS[number], list[tuple[int, list[float], torch.Tensor]]()
    adjust = CpuBackend.adjust_logits

    def noted(ops: Any, logits: torch.Tensor, rows: Any, last: Any, positions: Any, t: Any) -> Any:
        before = logits[0].tolist()
        found = adjust(ops, logits, rows, last, positions, t)
        steps.append((int(positions[0]), before, found[0].clone()))
        return found

    monkeypatch.setattr(CpuBackend, "adjust_logits", noted)
    (done,), _ = complete(checkpoint("qwen2"), [params], speculation=False)
    assert len(steps) == len(done.token_ids)
    for i, (position, before, after) in enumerate(steps):
        assert position == len(PROMPT) + i
        expected = torch.tensor(reference(before, PROMPT, done.token_ids[:i], params))
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    if number == 3:
        pairs = list(zip(done.token_ids, done.token_ids[1:], strict=False))
        assert (9, 9) in pairs
        assert (11, 9) not in pairs
        assert ((9, 9), 11) not in zip(pairs, done.token_ids[2:], strict=False)
    if number == 4:  # the stop id, which the bias makes certain, comes as soon as it may
        assert done.token_ids.index(8) == 6
        assert (done.stop_id, done.finish_reason) == (8, "stop")
        assert done.logprobs is not None
        assert all(entry.logprob <= 0 for entry in done.logprobs)


def test_results_depend_on_neither_the_batch_nor_how_steps_run(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen2")
    alone = [complete(folder, [each], speculation=False)[0][0] for each in PARAMS]
    expected = results(alone)
    assert len({tuple(done.token_ids) for done in alone}) == len(PARAMS)
    together, _ = complete(folder, PARAMS, speculation=False)
    assert results(together) == expected
    with patch.object(Speculation, "_best_limit", return_value=3):
        drafted, engine = complete(folder, PARAMS, speculation=True)
    assert results(drafted) == expected
    assert engine.stats.accepted_tokens > 0
    small, engine = complete(folder, PARAMS, speculation=False, kv_memory=7 << 14)
    assert results(small) == expected
    assert engine.stats.preemptions > 0
    # Steps that are captured, or launched before the tokens of the last one are known.
    monkeypatch.setattr(model_runner, "choose_backend", TensorLengths)
    config = EngineConfig(
        dtype="float32", kv_memory=1 << 20, speculation=False, max_batch_size=5, max_batch_tokens=64
    )
    for is_captured in (True, False):
        with Engine(folder, config) as engine:
            if is_captured:
                engine.runner.capture(Taping())
            else:
                engine.steps.lookahead = 1
            found = engine.generate([Request(PROMPT, each) for each in PARAMS])
            assert results(sorted(found, key=lambda c: c.request_id)) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty must be from -2 to 2, not 2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1, not -0.1"),
        ({"logit_bias": {1: 101}}, "logit_bias must be from -100 to 100, not 101"),
        ({"bad_words": ((),)}, "bad_words must not contain an empty sequence"),
        ({"min_new_tokens": 4, "max_new_tokens": 3}, "min_new_tokens must be at most max_new"),
        (
            {"logit_bias": dict.fromkeys(range(1025), 1)},
            "logit_bias must have at most 1024 entries",
        ),
    ],
)
def test_values_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        SamplingParams(**given)


def test_tokens_outside_the_vocabulary_fail_alone(checkpoint: Callable[[str], Path]) -> None:
    bad = SamplingParams(max_new_tokens=2, logit_bias={10**6: 1})
    (failed, fine), _ = complete(checkpoint("qwen2"), [bad, PARAMS[2]])
    assert "logit_bias has the token id 1000000, but the vocabulary has" in str(failed.error)
    assert len(fine.token_ids) == 30


_BUDGET = ThinkingBudget(3, start_ids=(40,), end_ids=(41,), forced_ids=(42, 41), is_open=True)


def test_thinking_is_followed_across_markers() -> None:
    state, written = Thinking(_BUDGET), list[int]()
    for sampled in (1, 41, 9, 40, 2, 3, 4, 5, 6, 40, 7):
        written.append(sampled if state.forced is None else state.forced)
        state.append(written[-1])
    # One thought before it ended itself, two in the next part, none in the last.
    assert written == [1, 41, 9, 40, 2, 3, 42, 41, 6, 40, 42]


@pytest.mark.parametrize("limit", [0, 4])
def test_a_thinking_budget_forces_tokens_however_steps_run(
    limit: int, checkpoint: Callable[[str], Path]
) -> None:
    folder, params = checkpoint("qwen2"), []
    for seed in range(4):
        values = {**_COMMON, "temperature": seed / 2, "seed": seed, "logprobs": 2 * (seed % 2)}
        budget = ThinkingBudget(limit + seed % 2, (40,), (41,), (42, 41), True)
        params.append(SamplingParams(**values, frequency_penalty=seed / 4, thinking=budget))
    alone = [complete(folder, [each], speculation=False)[0][0] for each in params]
    for seed, done in enumerate(alone):
        at = limit + seed % 2
        assert done.token_ids[at : at + 2] == [42, 41]
        assert done.logprobs is not None
        assert [done.logprobs[at + i].logprob for i in range(2)] == [0, 0]
        # What follows is what would follow if the model had sampled these tokens.
        if not seed:
            own = Request([*PROMPT, *done.token_ids[: at + 2]], SamplingParams(**_COMMON))
            with Engine(folder, EngineConfig(dtype="float32", kv_memory=8 << 20)) as engine:
                (rest,) = engine.generate([own])
            assert rest.token_ids[: 28 - at] == done.token_ids[at + 2 :]
    with patch.object(Speculation, "_best_limit", return_value=3):
        drafted, _ = complete(folder, params, speculation=True)
    assert results(drafted) == results(alone)
    config = EngineConfig(dtype="float32", kv_memory=8 << 20, speculation=False)
    with Engine(folder, config) as engine:
        engine.runner.record()
        engine.steps.lookahead = 1
        ahead = engine.generate([Request(PROMPT, each) for each in params])
        assert results(sorted(ahead, key=lambda c: c.request_id)) == results(alone)
