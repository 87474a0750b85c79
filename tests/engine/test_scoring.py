"""Log-probabilities of prompts: those of transformers, in pieces, whatever the steps are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import Completion, Engine, EngineConfig, Request, SamplingParams
from engine.execution import scoring

LENGTHS = (40, 37, 3, 29)
PROMPTS = [[(7 * i + 11 * j + i * j) % 500 + 1 for j in range(n)] for i, n in enumerate(LENGTHS)]
PROMPTS[3][:24] = PROMPTS[0][:24]  # a common prefix


def complete(
    folder: Path, params: list[SamplingParams], lookahead: int = 0, **settings: Any
) -> tuple[list[Completion], Engine]:
    config = {"dtype": "float32", "kv_memory": 8 << 20, "speculation": False, **settings}
    with Engine(folder, EngineConfig(**config)) as engine:
        engine.steps.lookahead = lookahead
        requests = [Request(p, each) for p, each in zip(PROMPTS, params, strict=True)]
        return sorted(engine.generate(requests), key=lambda c: c.request_id), engine


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path]) -> list[torch.Tensor]:
    """The log-probabilities [positions - 1, vocab] of transformers."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen2"), dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([p])).logits[0, :-1].log_softmax(-1) for p in PROMPTS]


def check(done: list[Completion], expected: list[torch.Tensor], params: list[Any]) -> None:
    for completion, prompt, reference, own in zip(done, PROMPTS, expected, params, strict=True):
        assert completion.error is None
        if own.prompt_logprobs is None:
            assert completion.prompt_logprobs is None
            continue
        first, found = own.prompt_logprobs_from, completion.prompt_logprobs
        assert found is not None
        assert len(found) == len(prompt) - first
        for entry, token, row in zip(found, prompt[first:], reference[first - 1 :], strict=True):
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
            values, ids = row.topk(own.prompt_logprobs)
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
            assert [id_ for id_, _ in entry.top] == ids.tolist()


PARAMS = [
    SamplingParams(max_new_tokens=0, prompt_logprobs=0),
    SamplingParams(max_new_tokens=25, ignore_eos=True, prompt_logprobs=3, logprobs=1),
    SamplingParams(max_new_tokens=25, ignore_eos=True),
    SamplingParams(max_new_tokens=0, prompt_logprobs=2, prompt_logprobs_from=26),
]


def test_scores_equal_those_of_transformers(
    checkpoint: Callable[[str], Path],
    expected: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint("qwen2")
    done, engine = complete(folder, PARAMS)
    check(done, expected, PARAMS)
    assert [(len(c.token_ids), c.finish_reason) for c in done[::3]] == [(0, "length")] * 2
    # Only positions before those that are scored come from the prefix cache.
    assert [c.cached_tokens for c in done] == [0, 0, 0, 16]
    assert engine.stats.prompt_tokens == sum(LENGTHS)
    plain = [SamplingParams(max_new_tokens=25, ignore_eos=True)] * 4
    assert done[1].token_ids == complete(folder, plain)[0][1].token_ids
    # Pieces of 2 rows, chunks of 7 tokens, and preemption of steps that are launched ahead.
    monkeypatch.setattr(scoring, "_MAX_PIECE_BYTES", 2 * 4 * 512)
    for lookahead in (0, 1):
        done, engine = complete(folder, PARAMS, lookahead, max_batch_tokens=7, kv_memory=6 << 14)
        check(done, expected, PARAMS)
    assert engine.stats.preemptions > 0


def test_the_logits_of_a_prompt_are_never_whole(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    measured = torch.Tensor.logsumexp

    def noted(logits: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        nonlocal most
        most = max(most, logits.numel())
        return measured(logits, *args, **named)

    monkeypatch.setattr(torch.Tensor, "logsumexp", noted)
    monkeypatch.setattr(scoring, "_MAX_PIECE_BYTES", 5 * 4 * 512)
    complete(checkpoint("qwen2"), [PARAMS[0]] * 4)
    assert 0 < most <= 5 * 512
