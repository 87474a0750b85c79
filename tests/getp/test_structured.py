"""Structured output: JSON schemas, regular expressions, choices and grammars."""

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from getp import LLM, Grammar, SamplingParams
from getp.checkpoints import embedded_model
from getp.job.formats.jsonl import parse_flat
from getp.openai.body import read_body
from getp.openai.parsed import BadRequestError
from getp.text.grammars import after_thinking
from tests.getp.helpers import metaspace, small_tokenizer
from tokenizer import ChatTemplate, Tokenizer

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")
# Keywords of JSON Schema that llguidance refuses; the test is that it names them.
_UNSUPPORTED: dict[str, Any] = {
    "not": {"type": "null"},
    "if": {"type": "integer"},
    "contains": {"const": 1},
    "uniqueItems": True,
    "propertyNames": {"maxLength": 3},
    "dependentRequired": {"a": ["b"]},
    "unevaluatedProperties": False,
}
_NAMES = ("a", "b", "foo bar", 'q"\\\n', "ü")


class Schemas:
    """Random schemas of the shapes in the JSON Schema Test Suite."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def schema(self) -> dict[str, Any]:
        found = self._any(3)
        if self._random.random() < 0.1:
            name = self._random.choice(list(_UNSUPPORTED))
            found[name] = _UNSUPPORTED[name]
        return {**found, "$defs": {"ref": self._leaf(), "name/~": self._leaf()}}

    def _any(self, depth: int) -> dict[str, Any]:
        kinds = [self._leaf, self._ref]
        if depth:
            nested = [self._object, self._array, self._union, self._all_of]
            kinds += [lambda make=make: make(depth - 1) for make in nested]  # type: ignore[misc]
        return self._random.choice(kinds)()

    def _leaf(self) -> dict[str, Any]:
        pick = self._random.choice
        low = self._random.randint(-50, 50)
        shapes: list[dict[str, Any]] = [
            {"type": "null"},
            {"type": "boolean"},
            {"type": ["integer", "null"]},
            {"type": "integer", "minimum": low, "maximum": low + pick([0, 3, 500])},
            {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": low + 1.5},
            {"type": "integer", "multipleOf": pick([1, 2, 7]), "minimum": 0, "maximum": 1000},
            {"type": "string", "minLength": 1, "maxLength": pick([1, 2, 9])},
            {"type": "string", "pattern": pick(["^[a-c]{2,4}$", "^\\d+-x?$", "^(ab|ü)*$"])},
            {"type": "string", "format": pick(["date", "uuid", "ipv4", "email"])},
            {"enum": [1, 2.5, None, "two", [3], {"x": True}][: pick([1, 3, 6])]},
            {"const": pick([0, "", "\U0001f600", False, {"a": []}])},
        ]
        return pick(shapes)

    def _ref(self) -> dict[str, Any]:
        return {"$ref": self._random.choice(["#/$defs/ref", "#/$defs/name~1~0"])}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(_NAMES, self._random.randint(0, 3))
        return {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": [name for name in names if self._random.random() < 0.6],
            "additionalProperties": self._random.choice([False, False, self._leaf()]),
        }

    def _array(self, depth: int) -> dict[str, Any]:
        first = {"prefixItems": [self._leaf()] * 2} if self._random.random() < 0.5 else {}
        least = self._random.randint(0, 3)
        found = {"type": "array", "items": self._any(depth), "minItems": least}
        return {**found, "maxItems": least + self._random.randint(0, 2), **first}

    def _union(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth) for _ in range(self._random.randint(1, 3))]}

    def _all_of(self, depth: int) -> dict[str, Any]:
        number = {"type": "number", "minimum": self._random.randint(-9, 9)}
        return {"allOf": [number, {"maximum": 20, "type": ["integer", "string"]}]}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(embedded_model(), dummy_weights=True, dtype="float32", max_batch_size=64) as model:
        yield model


def ending(llm: LLM) -> dict[int, float]:
    """A bias by which a model with random weights ends its texts and objects."""
    biases = {'"': 7.0, "}": 3.0, "]": 3.0}
    return {llm.tokenizer.encode(text)[-1]: bias for text, bias in biases.items()}


def test_every_output_is_valid_under_its_schema(llm: LLM) -> None:
    source, bias = Schemas(7), ending(llm)
    schemas = [source.schema() for _ in range(500)]
    params = [
        SamplingParams(
            temperature=1.2 * (i % 9 > 0),
            seed=i,
            max_new_tokens=100,
            repetition_penalty=1.0 + i % 2,
            logprobs=1 if i % 7 == 0 else None,
            logit_bias=bias,
            grammar=Grammar.json_schema(schema),
        )
        for i, schema in enumerate(schemas)
    ]
    reasons = Counter[str]()
    for schema, output in zip(schemas, llm.generate(["x"] * len(schemas), params), strict=True):
        (done,) = output.outputs
        reasons[done.finish_reason] += 1
        unsupported = _UNSUPPORTED.keys() & schema
        if unsupported:
            assert done.error is not None
            assert all(f'"{name}"' in done.error for name in unsupported)
        elif done.finish_reason == "stop":
            checker = jsonschema.FormatChecker()
            jsonschema.validate(json.loads(done.text), schema, format_checker=checker)
        else:
            assert done.finish_reason == "length"
            assert len(done.token_ids) == 100
    assert reasons["stop"] > 400
    assert reasons["error"] > 30


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "x", **fields}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar.json_object()),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}},
            Grammar.json_schema({"a": 1}),
        ),
        ({"guided_json": '{"a": 1}'}, Grammar.json_schema({"a": 1})),
        ({"guided_regex": "a+"}, Grammar("regex", "a+")),
        ({"guided_choice": ["a", 'b"']}, Grammar("lark", 'start: CHOICE\nCHOICE: "a" | "b\\""')),
        ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
        ({"structured_outputs": {"regex": "b", "json": None}}, Grammar("regex", "b")),
    ],
)
def test_the_fields_of_openai_and_vllm_are_read(fields: Any, grammar: Grammar | None) -> None:
    assert read_body(body(**fields), chat=False).params.get("grammar") == grammar


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "xml"}}, "'response_format' must be {'type': 'text'}"),
        ({"response_format": {"type": "json_schema"}}, "whose 'json_schema' has a 'schema'"),
        ({"guided_json": "{"}, "'guided_json' must be a JSON schema, but its text is not JSON"),
        ({"guided_json": True}, "'guided_json' must be a JSON schema that is an object"),
        ({"guided_choice": []}, "'guided_choice' must be a list of at least one string"),
        ({"guided_regex": "a", "guided_grammar": "b"}, "'guided_regex' and 'guided_grammar' are"),
        ({"structured_outputs": {"structural_tag": "a"}}, "does not support 'structural_tag'"),
        ({"structured_outputs": []}, "'structured_outputs' must be an object with one of json"),
    ],
)
def test_invalid_fields_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        read_body(body(**fields), chat=False)


def test_the_answer_matches_after_the_thinking_of_a_chat() -> None:
    question = [{"role": "user", "content": "What is 17 plus 25?"}]
    with LLM() as model:
        params = SamplingParams(grammar=Grammar.choice([str(number) for number in range(3000)]))
        ((found,),) = (each.outputs for each in model.chat(question, params))
        assert (found.text, found.finish_reason) == ("42", "stop")
        assert found.reasoning
        # The grammar forbids what the model would have said.
        params = SamplingParams(grammar=Grammar("regex", "-[0-9]{3}"))
        ((found,),) = (each.outputs for each in model.chat(question, params))
        assert re.fullmatch("-[0-9]{3}", found.text)


def with_markers() -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(metaspace().to_str())
    backend.add_tokens(["<think>", "</think>"])  # not special, as those of Qwen3
    return Tokenizer(backend, {}, ChatTemplate("{{ messages }}</think>", {}))


def test_thinking_comes_before_the_match_if_the_template_or_the_model_opens_it() -> None:
    plain = SamplingParams(grammar=Grammar("regex", "a"))
    tokenizer = with_markers()
    start, end = (tokenizer.encode(text, special=False) for text in ("<think>", "</think>"))

    def found(prompt: str, tokenizer: Tokenizer = tokenizer) -> Grammar:
        ids = tokenizer.encode(prompt, special=False)
        grammar = after_thinking(plain, tokenizer, ids).grammar
        assert grammar is not None
        return grammar

    assert found("a<think>\n") == Grammar("regex", "a", after_ids=(tuple(end),))
    assert found("a") == Grammar("regex", "a", after_ids=(tuple(end),), opening_id=start[0])
    assert found("a<think>\n\n</think>\n\n") == plain.grammar  # switched off
    text = Tokenizer(metaspace(), {}, ChatTemplate("{{ messages }}</think>", {}))
    assert found("a", text) == plain.grammar  # a match may begin with "<", too
    harmony = small_tokenizer()
    parts = found("a<|start|>assistant", harmony).after_ids
    assert [harmony.decode(ids, skip_special=False) for ids in parts] == [
        "<|channel|>final",
        "<|message|>",
    ]
    assert found("a<|channel|>final<|message|>", harmony) == plain.grammar


def test_a_missing_package_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(llm.engine.__dict__, "matchers", raising=False)
    params = SamplingParams(max_new_tokens=3, grammar=Grammar.json_object())
    failed, fine = llm.generate(["x", "y"], [params, SamplingParams(max_new_tokens=3)])
    assert failed.outputs[0].error == (
        "the grammar needs the package llguidance: pip install 'getp[structured]'"
    )
    assert fine.outputs[0].error is None


def test_the_example_of_the_readme_runs() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    example = re.search(r"\*\*Structured output\*\*.*?```\n(\{.*?)\n```", readme, re.DOTALL)
    assert example is not None
    request = json.loads(example[1])
    with LLM() as model:
        params = SamplingParams(**parse_flat(request).params)
        ((found,),) = (each.outputs for each in model.generate(request["prompt"], params))
        assert json.loads(found.text).keys() == {"sum"}
        assert found.finish_reason == "stop"
