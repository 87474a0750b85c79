"""Several answers to a prompt, and the other fields of requests, with the embedded model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import Completion, SamplingParams, TokenLogprobs
from getp import LLM
from getp.cli import main as cli
from getp.text.samples import choose_samples, sample_params

Run = Callable[..., dict[str, Any]]

_SAMPLED = {"temperature": 4, "seed": 4, "max_tokens": 12}
LINES: list[dict[str, Any]] = [
    {"id": "three", "prompt": "What is 17 plus 25?", "n": 3, **_SAMPLED},
    {"id": "best", "prompt": "What is 17 plus 25?", "n": 1, "best_of": 4, **_SAMPLED},
    {"id": "bad", "prompt": "What is 17 plus 25?", "n": 2, "logit_bias": {"999999": 1}},
    {"id": "bias", "prompt": "What is 17 plus 25?", "logit_bias": {"40": 100}, "max_tokens": 4},
    {
        "id": "min",
        "prompt": "What is 17 plus 25?",
        "min_tokens": 9,
        "max_tokens": 9,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
    },
    {"id": "plain", "prompt": "What is 17 plus 25?", "max_tokens": 12},
]


@pytest.fixture
def run() -> Callable[..., dict[str, Any]]:
    """Run lines in a folder; returns the response or the error of each line, by its id."""

    def run_lines(folder: Path, lines: list[dict[str, Any]], *options: str) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        files = ["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl")]
        given = ["-m", "getp", *files, "--dtype", "float32", *options]
        assert cli.run(given) in (0, 3)
        found = map(json.loads, (folder / "out.jsonl").open())
        return {each["custom_id"]: each["error"] or each["response"]["body"] for each in found}

    return run_lines


def test_fields_of_requests_work_together_and_alone(tmp_path: Path, run: Run) -> None:
    found = run(tmp_path / "all", LINES)
    choices = found["three"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    texts = [choice["text"] for choice in choices]
    assert len(set(texts)) > 1
    usage = found["three"]["usage"]
    assert usage["prompt_tokens"] == found["plain"]["usage"]["prompt_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    # The first of several answers is that of a request for one.
    one = run(tmp_path / "one", [{**LINES[0], "n": 1}])["three"]
    assert one["choices"] == choices[:1]
    assert one["usage"]["completion_tokens"] < usage["completion_tokens"]
    assert len(found["best"]["choices"]) == 1
    assert found["best"]["choices"][0]["logprobs"] is None
    assert found["best"]["usage"]["completion_tokens"] > one["usage"]["completion_tokens"]
    assert "logit_bias has the token id 999999" in found["bad"]["message"]
    assert len(set(found["bias"]["choices"][0]["text"])) == 1
    assert found["min"]["usage"]["completion_tokens"] == 9
    assert found["plain"]["usage"]["completion_tokens"] < 9
    reordered = run(tmp_path / "reversed", LINES[::-1], "--max-batch-size", "2")
    for key, body in found.items():
        for name in ("choices", "usage", "message"):
            assert reordered[key].get(name) == body.get(name)


def test_the_prompt_of_several_answers_is_computed_once() -> None:
    with LLM() as llm:
        (output,) = llm.generate(
            "What is 17 plus 25? " * 12, SamplingParams(temperature=1, max_new_tokens=3), n=4
        )
        prompt, stats = len(output.prompt_token_ids), llm.engine.stats
    assert prompt > 64
    assert stats.prompt_tokens == 4 * prompt
    # All but the last block, which each of them computes.
    assert stats.cached_tokens == 3 * ((prompt - 1) // 16 * 16)


def test_the_most_likely_answers_are_chosen_in_order() -> None:
    def completion(name: int, *logprobs: float) -> Completion:
        entries = [TokenLogprobs(value, ()) for value in logprobs]
        return Completion(name, [1] * len(logprobs), "stop", logprobs=entries)

    given = [completion(0, -3.0, -1.0), completion(1, -1.0), completion(2, -0.5, -0.5, -0.5)]
    chosen = choose_samples(given, 2, with_logprobs=False)
    assert [each.request_id for each in chosen.chosen] == [2, 1]
    assert chosen.completion_tokens == 6
    assert all(each.logprobs is None for each in chosen.chosen)
    kept = choose_samples(given, 3, with_logprobs=True)
    assert list(kept.chosen) == given
    params = SamplingParams(temperature=1, seed=5)
    assert sample_params(params, 0, 1, 1) is params
    seeds = {sample_params(params, index, 2, 3).seed for index in range(3)}
    assert len(seeds) == 3
    assert 5 in seeds
    assert sample_params(params, 1, 2, 3).logprobs == 0
    assert sample_params(params, 1, 3, 3).logprobs is None
