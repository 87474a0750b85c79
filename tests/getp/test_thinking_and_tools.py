"""Thinking, tools and long prompts of requests, in jobs and on the terminal."""

import io
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from engine import Completion, Request, SamplingParams
from getp.cli import main as cli
from getp.job.job import set_options
from getp.job.request_reader import RequestDefaults
from getp.text import chat_session
from getp.text.answer_text import Answer, AnswerOptions, read_answer
from getp.text.chat_session import ChatSettings
from getp.text.parts.tool_bodies import ToolCall
from getp.text.prompts import template_messages
from getp.text.truncate import Truncation
from tests.getp.helpers import FakeEngine, byte_level, fake_engine, small_tokenizer
from tests.getp.test_formats import CHAT, HI, batch_line, body, run
from tokenizer import ChatTemplate, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = """\
{%- for tool in tools or [] %}{{ tool.function.name }} {% endfor -%}
{%- for message in messages -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endfor -%}
<|start|>assistant<|message|>{% if enable_thinking is defined and not enable_thinking -%}
<think>\n\n</think>\n\n{% else -%}
<think>\n{% endif %}{# <tool_call> #}"""
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


def write_model(folder: Path) -> str:
    """Write the embedded model with a template that begins in the thinking, without channels."""
    for file in (ROOT / "data" / "model").iterdir():
        shutil.copy(file, folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|channel|>", "<|chan|>"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def run_job(model: str, folder: Path, lines: Sequence[Any], *options: str) -> dict[str, Any]:
    folder.mkdir()
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl")]
    assert cli.run([model, "-m", "getp", *files, "--dtype", "float32", *options]) in (0, 3)
    found = map(json.loads, (folder / "out.jsonl").open())
    return {each["custom_id"]: each["error"] or each["response"]["body"] for each in found}


def message(found: dict[str, Any]) -> dict[str, Any]:
    (choice,) = found["choices"]
    part: dict[str, Any] = choice["message"]
    return part


def test_a_budget_ends_the_thinking_of_its_request_alone(
    thinking_model: str, tmp_path: Path
) -> None:
    question = [{"role": "user", "content": "What is 17 plus 25?"}]
    common: dict[str, Any] = {"messages": question, "max_tokens": 30, "ignore_eos": True}
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    lines = [
        {"id": "none", **common, "thinking_token_budget": 0},
        {"id": "two", **common, "thinking_token_budget": 2},
        {"id": "free", **common, "thinking_token_budget": -1},
        {"id": "default", **common},
        {"id": "off", **common, **off},
        {"id": "effort", **common, "reasoning_effort": "none"},
        {"id": "bad", **common, "thinking_token_budget": -2},
    ]
    found = run_job(thinking_model, tmp_path / "a", lines, "--thinking-budget", "5")
    assert "'thinking_token_budget' must be 0 or more" in found.pop("bad")["message"]
    thought = {key: message(each).get("reasoning_content", "") for key, each in found.items()}
    assert thought["none"] == thought["off"] == thought["effort"] == ""
    assert message(found["off"]) == message(found["effort"])
    assert message(found["free"])["content"] == ""  # it thinks to the end
    assert thought["free"].startswith(thought["default"])
    assert thought["default"].startswith(thought["two"])
    assert 0 < len(thought["two"]) < len(thought["default"]) < len(thought["free"])
    for key in ("none", "two", "default", "off"):
        assert message(found[key])["content"]
        assert "think>" not in message(found[key])["content"]
        assert found[key]["usage"]["completion_tokens"] == 30
    again = run_job(
        thinking_model, tmp_path / "b", lines[-2::-1], "--max-batch-size", "2",
        "--thinking-budget", "5",
    )  # fmt: skip
    assert {key: message(each) for key, each in again.items()} == {
        key: message(each) for key, each in found.items()
    }


def test_a_budget_ends_the_analysis_of_a_model_with_channels(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "data" / "model", tmp_path / "model")
    file = tmp_path / "model" / "chat_template.jinja"
    file.write_text(file.read_text().rstrip() + "<|channel|>analysis<|message|>")
    question = [{"role": "user", "content": "What is 17 plus 25?"}]
    lines = [
        {"id": "two", "messages": question, "thinking_token_budget": 2},
        {"id": "none", "messages": question, "thinking_token_budget": 0},
    ]
    found = run_job(str(tmp_path / "model"), tmp_path / "out", lines)
    for key, thought in (("two", True), ("none", False)):
        assert bool(message(found[key]).get("reasoning_content")) == thought
        assert message(found[key])["content"]
        assert found[key]["choices"][0]["finish_reason"] == "stop"


def test_examples_of_the_readme_run(thinking_model: str, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found_lines = map(json.loads, re.findall(r'^\{"id": .*\}$', text, re.MULTILINE))
    lines = [line for line in found_lines if "completion" not in line]  # those are for -m score
    assert len(lines) >= 4
    fields = set().union(*lines)
    assert {"n", "thinking_token_budget", "chat_template_kwargs", "tools"} <= fields
    for number, line in enumerate(lines):
        line |= {"id": str(number), "max_tokens": 8}
    found = run_job(thinking_model, tmp_path / "readme", lines)
    for line in lines:
        assert len(found[line["id"]]["choices"]) == line.get("n", 1), found[line["id"]]


def answers(text: str, template: str = TEMPLATE) -> tuple[FakeEngine, Tokenizer]:
    """An engine that answers with a text, and a tokenizer whose model has no channels."""
    backend = type(byte_level()).from_str(byte_level().to_str().replace("<|call|>", "<|c|>"))
    backend = type(backend).from_str(backend.to_str().replace("<|return|>", "<|r|>"))
    tokenizer = Tokenizer(backend, {"eos_token": "<eos>"}, ChatTemplate(template))

    class Stops(FakeEngine):
        def _completion(self, request: Request, ids: list[int], reason: str) -> Completion:
            return super()._completion(request, ids, "stop")

    return Stops(lambda prompt: tokenizer.encode(text)), tokenizer


CALLS = (
    "so\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)


def test_calls_of_tools_are_parts_of_responses(tmp_path: Path) -> None:
    engine, tokenizer = answers(CALLS)
    named = {"type": "function", "function": {"name": "weather"}}
    lines = [
        batch_line(CHAT, "a", messages=HI, tools=[TOOL]),
        batch_line(CHAT, "b", messages=HI, tools=[TOOL], tool_choice="none"),
        batch_line(CHAT, "c", messages=HI, tools=[TOOL], parallel_tool_calls=False),
        batch_line(CHAT, "d", messages=HI, tools=[{"type": "function", "function": {}}]),
        batch_line(CHAT, "e", messages=HI, tool_choice="required"),
        batch_line(CHAT, "f", messages=HI, tool_choice=named, tools=[]),
        batch_line(CHAT, "g", messages=HI, functions=[TOOL]),
    ]
    _, records = run(tmp_path, lines, engine=engine, tokenizer=tokenizer)
    (choice,) = ChatCompletion.model_validate(body(records[0]), strict=True).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.model_extra == {"reasoning_content": "so"}
    found = message(body(records[0]))["tool_calls"]
    assert [each["function"]["arguments"] for each in found] == [
        '{"city": "Paris"}',
        '{"city": "Rome"}',
    ]
    assert len({each["id"] for each in found}) == 2
    assert message(body(records[1])).get("tool_calls") is None
    assert message(body(records[1]))["content"].count("<tool_call>") == 2
    assert [each["function"]["arguments"] for each in message(body(records[2]))["tool_calls"]] == [
        '{"city": "Paris"}'
    ]
    errors = [record["error"]["message"] for record in records[3:]]
    for error, text in zip(
        errors, ("tool 1 has no 'name'", "needs 'tools'", "needs 'tools'", "use 'tools'"),
        strict=True,
    ):  # fmt: skip
        assert text in error
    prompts = {
        request.request_id: tokenizer.decode(request.prompt_ids) for request in engine.requests
    }
    assert prompts[0].startswith("weather ")
    assert not prompts[1].startswith("weather ")


def test_a_forced_call_is_valid_under_the_schema_of_its_tool(
    thinking_model: str, tmp_path: Path
) -> None:
    pytest.importorskip("llguidance")
    schema: dict[str, Any] = {"$defs": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    schema |= {"properties": {"city": {"$ref": "#/$defs/city"}}, "additionalProperties": False}
    tools = [TOOL, {"type": "function", "function": {"name": "map", "parameters": schema}}]
    common: dict[str, Any] = {"messages": HI, "tools": tools, "max_tokens": 150}
    named = {"type": "function", "function": {"name": "map"}}
    other = {"type": "function", "function": {"name": "other"}}
    lines = [
        {"id": "named", **common, "tool_choice": named, "thinking_token_budget": 2},
        {"id": "any", **common, "tool_choice": "required", "reasoning_effort": "none",
         "tools": tools[1:], "parallel_tool_calls": False},
        {"id": "unknown", **common, "tool_choice": other},
        {"id": "both", **common, "tool_choice": named, "response_format": {"type": "json_object"}},
    ]  # fmt: skip
    found = run_job(thinking_model, tmp_path / "a", lines)
    assert "'other' is not one of 'tools'" in found["unknown"]["message"]
    assert "give only one of them" in found["both"]["message"]
    assert message(found["named"])["reasoning_content"]
    for key in ("named", "any"):
        (call,) = message(found[key])["tool_calls"]
        assert call["function"]["name"] == "map"
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
        assert found[key]["choices"][0]["finish_reason"] == "tool_calls"
        assert message(found[key])["content"] is None


def test_forced_calls_are_read_in_the_final_channel() -> None:
    tokenizer = small_tokenizer()
    options = AnswerOptions(chat=True, tools={"f": None}, forced_calls=True)
    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"
    for calls, found in (('[{"name":"f","arguments":{}}]', ("", ["f"])), ('[{"na', ('[{"na', []))):
        answer = read_answer(tokenizer, tokenizer.encode(text + calls), (), options)
        assert answer.reasoning == "hm"
        assert (answer.content, [each.recipient for each in answer.tool_calls]) == found


def test_earlier_messages_have_the_form_that_the_template_accepts() -> None:
    call = {"id": "call_abc", "function": {"name": "f", "arguments": {}}}
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_abc", "content": "1"},
        {"role": "assistant", "content": "x", "reasoning_content": "hm", "tool_calls": [call]},
    ]
    oss = ChatTemplate("{{ message.thinking }}")
    assert [each.get("thinking") for each in template_messages(oss, turns)] == ["hm", None, None]
    mistral = ChatTemplate("{% if tool_call.id | length != 9 %}{% endif %}{{ reasoning_content }}")
    first, result, _ = template_messages(mistral, turns)
    assert first["tool_calls"][0]["id"] == result["tool_call_id"]
    assert re.fullmatch(r"[a-z0-9]{9}", result["tool_call_id"])
    assert first["reasoning_content"] == "hm"
    assert template_messages(mistral, [{**turns[1], "tool_call_id": "abcdefghi"}])[0][
        "tool_call_id"
    ] == "abcdefghi"  # fmt: skip
    assert turns[0]["tool_calls"] == [call]


def test_a_template_without_tools_refuses_them_and_an_unknown_format_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, tokenizer = answers("x", "{{ messages[0].content }}")
    lines = [{"messages": HI, "tools": [TOOL]}, {"messages": HI}]
    _, (refused, done) = run(tmp_path, lines, engine=engine, tokenizer=tokenizer)
    assert "does not use tools" in refused["error"]["message"]
    assert body(done)
    engine, tokenizer = answers("x", "{{ tools }}{{ messages[0].content }}")
    run(tmp_path, lines[:1], engine=engine, tokenizer=tokenizer)
    assert "no known format of tool calls" in capsys.readouterr().err


def test_text_results_keep_calls() -> None:
    assert Answer("a", tool_calls=[ToolCall("f", '{"x": 1}')]).with_calls == (
        'a\n{"name": "f", "arguments": {"x": 1}}'
    )
    assert Answer("a").with_calls == "a"


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_that_are_too_long_are_cut_where_the_job_says(
    thinking_model: str, tmp_path: Path, side: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(f"w{number}" for number in range(400))
    turns = [{"role": "system", "content": "Short."}, {"role": "user", "content": words}]
    lines = [
        {"id": "chat", "messages": turns, "max_tokens": 4},
        {"id": "text", "prompt": words, "max_tokens": 4},
        {"id": "ids", "prompt": [7, *range(20, 300)], "max_tokens": 4},
        {"id": "short", "prompt": "w1 w2", "max_tokens": 4},
    ]
    options = ["-n", "100", "--output-format", "jsonl"]
    failed = run_job(thinking_model, tmp_path / "none", lines, *options)
    assert all("limit" in failed[key]["message"] for key in ("chat", "text", "ids"))
    found = run_job(thinking_model, tmp_path / side, lines, *options, "--truncate", side)
    assert [each.get("truncated") for each in found.values()] == [side, side, side, None]
    assert all(each["usage"]["prompt_tokens"] == 96 for each in list(found.values())[1:3])
    assert 80 < found["chat"]["usage"]["prompt_tokens"] <= 96
    assert "cut to the limit by --truncate: 3 prompts" in capsys.readouterr().err


def test_only_the_longest_message_is_cut() -> None:
    _, tokenizer = answers("")
    words = " ".join(f"w{number}" for number in range(200))
    turns = [{"role": "system", "content": "Short."}, {"role": "user", "content": words}]

    def render(messages: Any) -> str:
        assert tokenizer.template is not None
        return tokenizer.template.render(messages)

    for side, kept in (("left", "w199"), ("right", "w0")):
        cut = Truncation(side, tokenizer, 160, None)  # type: ignore[arg-type]
        ids, is_cut = cut.conversation(turns, render)
        text = tokenizer.decode(ids, skip_special=False)
        assert is_cut
        assert len(ids) <= 80
        assert text.startswith("<|start|>system<|message|>Short.<|end|>")
        assert text.endswith("<think>\n")
        assert kept in text
    assert turns[1]["content"] == words
    assert Truncation("left", tokenizer, 999, None).text("w1 w2") == (
        tokenizer.encode("w1 w2"),
        False,
    )


def test_a_chat_shows_thinking_beside_the_answer_and_leaves_it_out_afterwards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = answers("")
    engine: Any = fake_engine(lambda prompt: tokenizer.encode("hm\n</think>\n\nfour"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("2+2?\nsure?\n"))
    settings = ChatSettings(SamplingParams(), AnswerOptions(chat=True), variables={"effort": 1})
    chat_session.chat(settings, None, tokenizer, engine)
    out, err = capsys.readouterr()
    assert out == "four\nfour\n"
    assert "[thinking] hm" in err
    assert "does not use 'effort'" in err
    assert "hm" not in tokenizer.decode(engine.requests[1].prompt_ids)
    settings = ChatSettings(SamplingParams(), AnswerOptions(chat=True), thinking_budget=3)
    chat_session.generate(settings, "2+2?", tokenizer, engine)
    budget = engine.requests[-1].params.thinking
    assert (budget.max_tokens, budget.is_open) == (3, True)
    assert tokenizer.decode(budget.forced_ids) == "\n</think>\n\n"


def test_options_that_cannot_have_an_effect_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("1\nhi\n")
    files = ["-i", str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.txt")]
    assert cli.run(["-m", "getp", *files, "--reasoning-effort", "low"]) == 2
    assert "need --chat-template" in capsys.readouterr().err
    assert cli.run(["-m", "generate", "-i", "x", "--chat-template-kwargs", "[1]"]) == 2
    defaults = RequestDefaults(SamplingParams())
    assert set_options(defaults) == {}  # older journals stay valid
    set_ones = replace(defaults, thinking_budget=0, truncate="left", variables={"x": 1})
    assert set_options(set_ones).keys() == {"thinking_budget", "truncate", "chat_template_kwargs"}
    assert "is not a JSON object" in capsys.readouterr().err
