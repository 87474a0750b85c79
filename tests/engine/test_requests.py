"""Arguments of `Engine.generate`: ids, seeds, and errors that leave the engine usable."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import Completion, Engine, EngineConfig, Request, SamplingParams

PROMPT = [1, 2, 3, 4]
SHORT = SamplingParams(max_new_tokens=4, ignore_eos=True)
HOT = SamplingParams(temperature=1.5, max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(checkpoint: Callable[[str], Path]) -> Iterator[Engine]:
    config = EngineConfig(device="cpu", dtype="float32", kv_memory=16 << 20)
    with Engine(checkpoint("qwen3"), config) as engine:
        yield engine


def run(engine: Engine, *requests: Request) -> list[Completion]:
    return sorted(engine.generate(requests), key=lambda done: done.request_id)


def assert_usable(engine: Engine) -> None:
    """A request still runs, alone: nothing of an earlier call is left."""
    (done,) = engine.generate([Request(PROMPT, SHORT)])
    assert len(done.token_ids) == 4
    assert engine.steps.scheduler.cache.num_used == 0


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (Request(PROMPT), r"not one Request: use \[request\]"),
        ("What is 1+1?", "getp.LLM, which takes text"),
        (["What is 1+1?"], r"position 0, not 'What is 1\+1\?'.*getp.LLM"),
        (b"text", "expected an iterable of requests"),
        (5, "expected an iterable of requests, not 5"),
        (None, "expected an iterable of requests, not None"),
        ([1, 2, 3], r"position 0, not 1: use Request\(token_ids\)"),
        ([[1, 2, 3]], r"position 0, not \[1, 2, 3\]"),
        ([{"prompt": "a"}], "position 0"),
        ([Request(PROMPT, SHORT), None, "b"], "position 1, not 'b'"),
    ],
)
def test_anything_but_requests_is_a_type_error_and_the_engine_stays_usable(
    engine: Engine, requests: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        list(engine.generate(requests))
    assert_usable(engine)


def test_an_argument_of_the_wrong_type_is_refused_at_the_call(engine: Engine) -> None:
    with pytest.raises(TypeError):
        engine.generate(Request(PROMPT))  # type: ignore[arg-type]  # not iterated
    assert_usable(engine)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request("text"), "not text: encode it"),  # type: ignore[arg-type]
        (lambda: Request(b"text"), "not text"),
        (lambda: Request(7), "prompt_ids must be a list of token ids, not 7"),  # type: ignore[arg-type]
        (lambda: Request([1.5]), "a token id must be an integer, not 1.5"),  # type: ignore[list-item]
        (lambda: Request(["a"]), "a token id must be an integer, not 'a'"),  # type: ignore[list-item]
        (lambda: Request([[1, 2]]), r"must be an integer, not \[1, 2\]"),  # type: ignore[list-item]
        (lambda: Request(PROMPT, 0.8), "params must be SamplingParams, not 0.8"),  # type: ignore[arg-type]
        (lambda: Request(PROMPT, request_id="a"), "request_id must be an integer"),  # type: ignore[arg-type]
        (lambda: Request(PROMPT, on_token=5), "on_token must be a function"),  # type: ignore[arg-type]
        (lambda: SamplingParams(temperature="hot"), "temperature must be a number, not 'hot'"),  # type: ignore[arg-type]
        (lambda: SamplingParams(top_p=None), "top_p must be a number, not None"),  # type: ignore[arg-type]
        (lambda: SamplingParams(max_new_tokens="5"), "max_new_tokens must be an integer or None"),  # type: ignore[arg-type]
        (lambda: SamplingParams(max_new_tokens=5.0), "max_new_tokens must be an integer or None"),  # type: ignore[arg-type]
        (lambda: SamplingParams(seed="x"), "seed must be an integer or None"),  # type: ignore[arg-type]
        (lambda: SamplingParams(stop_ids=[5]), "stop_ids must be a set of token ids"),  # type: ignore[arg-type]
        (lambda: SamplingParams(stop_ids={"a"}), "a set of token ids, but has 'a'"),  # type: ignore[arg-type]
        (lambda: SamplingParams(ignore_eos="no"), "ignore_eos must be True or False, not 'no'"),  # type: ignore[arg-type]
        (lambda: SamplingParams(logprobs=2.5), "logprobs must be an integer or None"),  # type: ignore[arg-type]
    ],
)
def test_values_of_the_wrong_type_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_a_long_wrong_value_is_shortened_in_the_message() -> None:
    with pytest.raises(TypeError) as caught:
        Request(PROMPT, "x" * 10_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "ids", [np.array(PROMPT), torch.tensor(PROMPT), tuple(PROMPT), range(1, 5), [True, 2, 3, 4]]
)
def test_prompts_may_be_any_sequence_of_integers(engine: Engine, ids: Any) -> None:
    (expected,) = run(engine, Request(PROMPT, SHORT))
    (done,) = run(engine, Request(ids, SHORT))
    assert done.token_ids == expected.token_ids


def test_a_set_of_stop_ids_needs_no_frozenset(engine: Engine) -> None:
    (whole,) = run(engine, Request(PROMPT, SHORT))
    stopping = SamplingParams(max_new_tokens=4, stop_ids={whole.token_ids[0]})  # type: ignore[arg-type]
    (done,) = run(engine, Request(PROMPT, stopping))
    assert done.token_ids == whole.token_ids[:1]
    assert done.finish_reason == "stop"


def test_a_request_without_an_id_gets_its_position(engine: Engine) -> None:
    requests = [None, Request([5], SHORT), None, Request([6], SHORT, 40), Request([7] * 9, SHORT)]
    done = {each.request_id: each.prompt_tokens for each in engine.generate(requests)}
    assert done == {0: 1, 40: 1, 2: 9}


def test_samples_without_a_seed_differ(engine: Engine) -> None:
    samples = run(engine, *[Request(PROMPT, HOT)] * 3)
    again = run(engine, Request(PROMPT, HOT))
    assert len({tuple(done.token_ids) for done in (*samples, *again)}) == 4


def test_samples_with_a_seed_are_equal(engine: Engine) -> None:
    seeded = SamplingParams(temperature=1.5, max_new_tokens=8, ignore_eos=True, seed=3)
    samples = run(engine, *[Request(PROMPT, seeded)] * 3)
    assert len({tuple(done.token_ids) for done in samples}) == 1


def test_integers_beyond_64_bits_have_the_effect_of_large_ones(engine: Engine) -> None:
    params = SamplingParams(temperature=1.5, max_new_tokens=8, ignore_eos=True, seed=3)
    large, larger = (Request(PROMPT, replace(params, top_k=top_k)) for top_k in (2**62, 10**30))
    first, second = run(engine, large, larger)
    assert first.token_ids == second.token_ids
    (done,) = run(engine, Request(PROMPT, replace(params, temperature=10**400)))
    assert len(done.token_ids) == 8


def test_an_error_in_a_callback_leaves_the_engine_usable(engine: Engine) -> None:
    def refuse(token_id: int) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(engine, Request(PROMPT, SHORT), Request(PROMPT, SHORT, on_token=refuse))
    assert_usable(engine)


def test_finish_ends_an_iterator_that_was_left_open(engine: Engine) -> None:
    left = engine.generate([Request(PROMPT, SHORT), Request(PROMPT * 2, HOT)])
    next(left)
    with pytest.raises(RuntimeError, match=r"already running.*finish\(\) also ends it"):
        next(engine.generate([Request(PROMPT)]))
    engine.finish()
    assert list(left) == []
    assert_usable(engine)
