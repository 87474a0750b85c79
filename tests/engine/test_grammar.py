"""Grammars in the engine: the same tokens however steps run; errors that concern one request."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from engine import (
    Completion,
    Engine,
    EngineConfig,
    Grammar,
    Request,
    SamplingParams,
    ThinkingBudget,
)
from engine.execution import model_runner
from engine.execution.matchers import Matchers
from engine.scheduling.speculation import Speculation
from tests.engine.captures import Taping, TensorLengths
from tokenizer import Tokenizer

pytest.importorskip("llguidance")
EMBEDDED = Path(__file__).resolve().parents[2] / "data/model"
TOKENIZER = Tokenizer.load(EMBEDDED)
QUOTE, LETTER = (TOKENIZER.encode(text)[-1] for text in '"a')
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
PARAMS = [
    SamplingParams(
        temperature=1.0,
        seed=1,
        max_new_tokens=60,
        grammar=Grammar.json_schema(SCHEMA),
        logit_bias={QUOTE: 7.0},
    ),
    SamplingParams(max_new_tokens=9, grammar=Grammar("regex", "[a-d ]{30,}"), logprobs=1),
    SamplingParams(max_new_tokens=25, ignore_eos=True),
    SamplingParams(
        temperature=1.0,
        seed=4,
        max_new_tokens=30,
        min_p=0.01,
        frequency_penalty=0.3,
        grammar=Grammar("lark", 'start: ("ab" | "xyz")~8', after_ids=((9,),)),
        # The last of the forced tokens ends the thinking, and is not part of what must match.
        thinking=ThinkingBudget(4, (40,), (9,), forced_ids=(8, 9, 7), is_open=True),
    ),
    # The output may begin with 40, or with a match.
    *(
        SamplingParams(
            max_new_tokens=24,
            grammar=Grammar("regex", "[a-d ]{30,}", after_ids=((8,), (9,)), opening_id=40),
            thinking=ThinkingBudget(3, (40,), (9,), forced_ids=(8, 7, 9)),
            logit_bias={40: bias},
        )
        for bias in (90.0, -90.0)
    ),
]


def engine_of(folder: Path, **settings: Any) -> Engine:
    config = {"dtype": "float32", "kv_memory": 8 << 20, "speculation": False, **settings}
    engine = Engine(folder, EngineConfig(**config))
    engine.tokenizer_json = (EMBEDDED / "tokenizer.json").read_text
    return engine


def complete(engine: Engine, params: list[SamplingParams]) -> list[Completion]:
    found = engine.generate([Request(PROMPT, each) for each in params])
    return sorted(found, key=lambda c: c.request_id)


def results(done: list[Completion]) -> list[Any]:
    return [(c.token_ids, c.finish_reason, str(c.error)) for c in done]


def test_results_depend_on_neither_the_batch_nor_how_steps_run(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen2")
    with engine_of(folder) as engine:
        alone = [complete(engine, [each])[0] for each in PARAMS]
        expected = results(alone)
        assert results(complete(engine, PARAMS)) == expected
    texts = [TOKENIZER.decode(done.token_ids) for done in alone]
    assert set(json.loads(texts[0])) == {"name", "n"}
    assert alone[0].finish_reason == "stop"
    assert (len(alone[1].token_ids), alone[1].finish_reason) == (9, "length")
    assert not set(texts[1]) - set("abcd ")
    assert alone[1].logprobs is not None  # of the model: the mask has no part in them
    assert any(
        entry.top[0][0] != token
        for entry, token in zip(alone[1].logprobs, alone[1].token_ids, strict=True)
    )
    assert alone[3].token_ids[4:7] == [8, 9, 7]
    constrained = TOKENIZER.decode(alone[3].token_ids[7:])
    assert len(constrained) > 10
    assert constrained.replace("ab", "").replace("xyz", "") in ("", "a", "x", "xy")
    assert alone[4].token_ids[:7] == [40, 40, 40, 40, 8, 7, 9]
    for ids in (alone[4].token_ids[7:], alone[5].token_ids):
        assert not set(TOKENIZER.decode(ids)) - set("abcd ")
    drafts = patch.object(Speculation, "_best_limit", return_value=3)
    with drafts, engine_of(folder, speculation=True) as engine:
        assert results(complete(engine, PARAMS)) == expected
        assert engine.stats.accepted_tokens > 0
    with engine_of(folder, kv_memory=6 << 14) as engine:
        engine.steps.lookahead = 1  # a step is launched before its masks are known
        assert results(complete(engine, 2 * PARAMS)) == 2 * expected
        assert engine.stats.preemptions > 0
    monkeypatch.setattr(model_runner, "choose_backend", TensorLengths)
    with engine_of(folder, max_batch_size=5, max_batch_tokens=64) as engine:
        engine.runner.capture(Taping())
        engine.steps.lookahead = 1
        assert results(complete(engine, PARAMS)) == expected


def test_a_grammar_that_cannot_be_used_fails_alone(checkpoint: Callable[[str], Path]) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}}
    bad = [
        (
            Grammar.json_schema(schema),
            'the JSON schema cannot be used: Unimplemented keys: ["not"]',
        ),
        (Grammar.json_schema({"type": "strin"}), "Invalid type: strin"),
        (Grammar.json_schema({"type": "array", "items": False, "minItems": 1}), "Unsatisfiable"),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("lark", "start: foo"), 'unknown name: "foo"'),
        (Grammar("regex", r"[^\s\S]"), "cannot be used: no text can match it"),
        (Grammar.json_schema({"$ref": "#"}), "cannot be used: no text can match it"),
    ]
    params = [SamplingParams(max_new_tokens=4, grammar=grammar) for grammar, _ in bad]
    with engine_of(checkpoint("qwen2")) as engine:
        *failed, fine = complete(engine, [*params, PARAMS[2]])
        for done, (_, message) in zip(failed, bad, strict=True):
            assert message in str(done.error)
            assert len(done.token_ids) == 0
        assert len(fine.token_ids) == 25
        (done,) = complete(
            engine, [SamplingParams(grammar=Grammar("regex", "a"), bad_words=((LETTER,),))]
        )
        assert "forbid every token that the grammar allows" in str(done.error)
        before = complete(engine, [PARAMS[0]])
        engine.finish()
        assert results(complete(engine, [PARAMS[0]])) == results(before)
    engine.tokenizer_json = None
    del engine.__dict__["matchers"]
    (done,) = complete(engine, [PARAMS[0]])
    engine.finish()
    assert "set Engine.tokenizer_json" in str(done.error)


def test_a_grammar_that_compiles_slowly_delays_no_other_request(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_compile, compiled = threading.Event(), Matchers._compile

    def compile_slowly(self: Matchers, kind: str, text: str) -> Any:
        assert may_compile.wait(60)
        return compiled(self, kind, text)

    monkeypatch.setattr(Matchers, "_compile", compile_slowly)
    found: list[tuple[int, str]] = []
    with engine_of(checkpoint("qwen2")) as engine:
        for done in engine.generate([Request(PROMPT, PARAMS[i], i) for i in (1, 2, 0)]):
            found.append((done.request_id, done.finish_reason))
            if done.request_id == 2:
                engine.cancel(0)
            elif done.request_id == 0:
                may_compile.set()
    assert found == [(2, "length"), (0, "cancelled"), (1, "length")]
