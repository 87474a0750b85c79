"""Requests and responses as OpenAI and vLLM mean them."""

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from engine import Completion, Request
from engine.request import TokenLogprobs
from tests.getp.helpers import FakeEngine, small_tokenizer
from tests.getp.test_formats import (
    CHAT,
    HI,
    TEXT,
    TOKENIZER,
    Engine,
    batch_line,
    body,
    calls,
    run,
)


def test_values_without_effect_are_accepted(tmp_path: Path) -> None:
    both: dict[str, Any] = {
        "n": 1.0, "best_of": 1, "stream": True, "stream_options": {"include_usage": True},
        "min_p": 0, "repetition_penalty": 1.0, "length_penalty": 1, "frequency_penalty": 0,
        "presence_penalty": 0.0, "min_tokens": 0, "use_beam_search": False, "logit_bias": {"5": 0},
        "stop_token_ids": [], "bad_words": [], "skip_special_tokens": True, "top_k": -1,
        "include_stop_str_in_output": False, "response_format": {"type": "text"}, "priority": 3,
        "prompt_logprobs": None, "guided_json": None, "max_tokens": 5.0, "seed": 1.0,
    }  # fmt: skip
    engine = Engine()
    lines = [
        batch_line(TEXT, "a", prompt="x", logprobs=False, add_special_tokens=True, **both),
        batch_line(
            CHAT, "b", messages=HI, logprobs=False, top_logprobs=0, add_special_tokens=False,
            add_generation_prompt=True, tools=[], tool_choice="auto", **both,
        ),
        batch_line(CHAT, "c", messages=HI, top_logprobs=0),
        {"prompt": "y", "messages": None, **both},
    ]  # fmt: skip
    status, records = run(tmp_path, lines, engine=engine)
    assert status == 0, records
    by_id = {request.request_id: request.params for request in engine.requests}
    for index in (0, 1, 3):
        params = by_id[index]
        assert (params.max_new_tokens, params.top_k, params.seed) == (5, 0, 1)
        assert isinstance(params.max_new_tokens, int)
        assert params.logprobs is None
    assert by_id[2].logprobs is None


def test_unused_template_variables_are_ignored_with_one_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{{ messages[0].content }}{{ thinking }}"
    lines = [
        batch_line(CHAT, "a", messages=HI, reasoning_effort="low"),
        batch_line(CHAT, "b", messages=HI, chat_template_kwargs={"enable": 1, "thinking": "!"}),
        batch_line(CHAT, "c", messages=HI, chat_template_kwargs={"self": 1}),
    ]
    status, records = run(tmp_path, lines, tokenizer=small_tokenizer(template))
    assert status == 0
    assert [body(each)["choices"][0]["message"]["content"] for each in records] == [
        "hi",
        "hi!",
        "hi",
    ]
    err = capsys.readouterr().err
    assert err.count("does not use") == 1
    assert "does not use 'reasoning_effort': it is ignored" in err


# As Qwen's and others' (an object), as DeepSeek-R1's distillations (text), as Llama's (text).
OBJECT = """{% for m in messages %}{{ m.content }}|{% for call in m.tool_calls or [] %}
{{- call.function.name }}{{ call.function.arguments | tojson }}|{% endfor %}{% endfor %}"""
JOINED = """{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}
{%- for call in m['tool_calls'] %}
{{- call['function']['name'] + call['function']['arguments'] + '|' }}
{%- endfor %}{% else %}{{ m['content'] + '|' }}{% endif %}{% endfor %}"""
PRINTED = """{% for m in messages %}{{ m.content | trim }}|{% if 'tool_calls' in m %}
{%- for call in m.tool_calls %}{{ call.function.name }}{{ call.function.arguments }}|{% endfor %}
{%- endif %}{% endfor %}"""


# As Qwen3's and Ministral 3's, which test for None and yet fail at it.
THOUGHT = """{% for m in messages %}{% if m.reasoning_content is not none %}{% endif %}
{%- if 'x' in m.content %}{% endif %}{{ m.content }}|{% for call in m.tool_calls or [] %}
{{- call.function.name }}{{ call.function.arguments | tojson }}|{% endfor %}{% endfor %}"""
MEASURED = """{% for m in messages %}{% if m['content'] is none or m['content'] == '' %}{% endif %}
{%- if m['content'] | length %}{{ m['content'] }}{% endif %}|{% for call in m.tool_calls or [] %}
{{- call.function.name }}{{ call.function.arguments | tojson }}|{% endfor %}{% endfor %}"""


@pytest.mark.parametrize(
    ("template", "empty"),
    [(OBJECT, "|"), (JOINED, ""), (PRINTED, "|"), (THOUGHT, "|"), (MEASURED, "|")],
)
@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}])
def test_tool_calls_reach_templates_in_the_form_that_they_need(
    tmp_path: Path, template: str, empty: str, arguments: Any
) -> None:
    answer = {"role": "tool", "tool_call_id": "call_1", "content": "21"}
    done = {"role": "assistant", "content": "It is 21.", "tool_calls": None, "refusal": None}
    lines = [{"messages": [*HI, calls(arguments), answer, done]}]
    _, (record,) = run(tmp_path, lines, tokenizer=small_tokenizer(template))
    message = body(record)["choices"][0]["message"]
    assert message["content"] == f'hi|{empty}f{{"city": "Paris"}}|21|It is 21.|'


@pytest.mark.parametrize("arguments", ["", None, {}, "{}"])
def test_a_tool_call_without_arguments_has_an_empty_object(tmp_path: Path, arguments: Any) -> None:
    lines = [{"messages": [*HI, calls(arguments)]}]
    _, (record,) = run(tmp_path, lines, tokenizer=small_tokenizer(OBJECT))
    assert body(record)["choices"][0]["message"]["content"] == "hi||f{}|"


@pytest.mark.parametrize("absent", [{"content": None}, {}, {"content": []}])
def test_absent_content_of_the_assistant_is_empty_text(tmp_path: Path, absent: Any) -> None:
    lines = [{"messages": [*HI, {"role": "assistant", **absent}]}]
    template = "{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}"
    _, (record,) = run(tmp_path, lines, tokenizer=small_tokenizer(template))
    assert body(record)["choices"][0]["message"]["content"] == "<hi><>"


def test_the_tool_messages_of_the_issue_have_equal_prompts(tmp_path: Path) -> None:
    function = {"name": "get_weather", "arguments": {"city": "Paris", "unit": "C"}}
    call = {"id": "call_abc12", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_abc12", "content": '{"temp": 21}'},
    ]
    text = json.loads(json.dumps(messages))
    text[1]["content"] = None
    text[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(function["arguments"])
    engine = Engine()
    lines = [
        batch_line(CHAT, "string", messages=text),
        batch_line(CHAT, "object", messages=messages),
    ]
    run(tmp_path, lines, engine=engine, tokenizer=small_tokenizer(OBJECT))
    assert engine.requests[0].prompt_ids == engine.requests[1].prompt_ids


def test_text_logprobs_keep_the_sampled_and_the_most_likely_token(tmp_path: Path) -> None:
    text = "a語b"
    ids = TOKENIZER.encode(text)
    parts = [token for token in ids if TOKENIZER.decode([token]) == "\ufffd"]
    assert len(ids) == 5
    assert len(parts) == 3  # of one character
    other = TOKENIZER.encode("c")[0]

    class Likely(FakeEngine):
        def _completion(self, request: Request, ids: list[int], reason: str) -> Completion:
            done = super()._completion(request, ids, reason)
            top = ((parts[0], -0.25), (other, -1.0), (parts[1], -2.0))
            return Completion(
                **{**done.__dict__, "logprobs": [TokenLogprobs(-3.0, top) for _ in ids]}
            )

    _, (record,) = run(tmp_path, [batch_line(TEXT, prompt=text, logprobs=3)], engine=Likely())
    logprobs = body(record)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "\ufffd", "\ufffd", "\ufffd", "b"]
    assert logprobs["text_offset"] == [0, 1, 1, 1, 2]
    assert logprobs["top_logprobs"][0] == {"a": -3.0, "\ufffd": -0.25, "c": -1.0}
    assert logprobs["top_logprobs"][1] == {"\ufffd": -3.0, "c": -1.0}  # the sampled token's own


def test_offsets_count_neither_special_tokens_nor_text_after_a_stop_string(tmp_path: Path) -> None:
    lines = [
        batch_line(TEXT, "a", prompt="x<|end|>y", logprobs=0),
        batch_line(TEXT, "b", prompt="one two", logprobs=0, stop=" t"),
    ]
    _, (special, cut) = run(tmp_path, lines)
    found = body(special)["choices"][0]
    assert (found["text"], found["logprobs"]["text_offset"]) == ("xy", [0, 1, 1])
    found = body(cut)["choices"][0]
    assert found["text"] == "one"
    assert max(found["logprobs"]["text_offset"]) == 3


def test_a_preamble_is_content_and_a_tool_call_keeps_its_recipient(tmp_path: Path) -> None:
    generated = (
        "<|channel|>analysis<|message|>hm<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>so<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
        '{"a":1}<|call|>'
        "<|start|>assistant to=python<|channel|>analysis code<|message|>1+1<|call|>"
    )
    lines = [batch_line(CHAT, messages=HI)]

    class Stops(FakeEngine):
        def _completion(self, request: Request, ids: list[int], reason: str) -> Completion:
            return super()._completion(request, ids, "stop")

    engine = Stops(lambda prompt: TOKENIZER.encode(generated))
    _, (record,) = run(tmp_path, lines, engine=engine)
    (choice,) = ChatCompletion.model_validate(body(record), strict=True).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.model_extra == {"reasoning_content": "hm\nso"}
    found = body(record)["choices"][0]["message"]["tool_calls"]
    assert [each["function"] for each in found] == [
        {"name": "f", "arguments": '{"a":1}'},
        {"name": "python", "arguments": "1+1"},
    ]
    assert len({each["id"] for each in found}) == 2


def test_an_answer_that_only_calls_a_tool_has_no_content(tmp_path: Path) -> None:
    generated = "<|channel|>commentary to=functions.now<|message|><|call|>"
    engine = Engine(lambda prompt: TOKENIZER.encode(generated))
    _, (record,) = run(tmp_path, [batch_line(CHAT, messages=HI)], engine=engine)
    (choice,) = ChatCompletion.model_validate(body(record), strict=True).choices
    assert choice.message.content is None
    (call,) = body(record)["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": ""}
