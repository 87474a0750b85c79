"""Thinking and calls of tools in answers, in the formats of the supported families."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from getp.text.answer_text import Answer, AnswerOptions, AnswerText, _join, read_answer
from getp.text.parts.thinking import without_thinking
from getp.text.parts.tool_calls import format_of
from tests.getp.helpers import TEXTS, byte_level
from tokenizer import ChatTemplate, Tokenizer

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
}
TOOLS = {"weather": WEATHER, "now": None}
PARIS = '{"city": "Paris", "days": 2}'

HERMES = "<tool_call>"
MISTRAL = "[TOOL_CALLS]"
LLAMA = 'Respond in the format {"name": …, "parameters": dictionary of …}'
DEEPSEEK = "<｜tool▁calls▁begin｜>"
KIMI = "<|tool_calls_section_begin|>"
THINK = "{{ '<think>' }}{% if '</think>' in content %}"

# What a template mentions, the answer, its content, its reasoning and its calls.
ANSWERS: list[tuple[str, str, str, str, list[tuple[str, str]]]] = [
    (THINK, "<think>\nhm,\n\nso\n</think>\n\nIt is 4. ", "It is 4. ", "hm,\n\nso", []),
    (THINK, " <think></think>4 </think> <think>", "4 </think> <think>", "", []),
    (THINK, "  no <think>thinking</think>", "  no <think>thinking</think>", "", []),
    (THINK, "<think>without an end </thi", "", "without an end </thi", []),
    ("<seed:think></seed:think>", "<seed:think>a</seed:think>b", "b", "a", []),
    ("[THINK][/THINK]", "[THINK]a[/THINK]b", "b", "a", []),
    ("<|channel><channel|>", "<|channel>thought\na\n<channel|>b", "b", "a", []),
    (
        THINK + HERMES,
        '<think>hm</think>I look.\n<tool_call>\n{"name": "weather", "arguments": '
        + PARIS
        + '}\n</tool_call>\n<tool_call>{"name":"other"}</tool_call>\n',
        "I look.",
        "hm",
        [("weather", PARIS), ("other", "{}")],
    ),
    (
        HERMES,
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2"
        "\n</parameter>\n</function>\n</tool_call>",
        "",
        "",
        [("weather", PARIS)],
    ),
    (
        HERMES,
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days"
        "</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        "",
        "",
        [("weather", PARIS)],
    ),
    (
        "<minimax:tool_call>",
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="note">null</parameter>\n'
        '</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        "",
        "",
        [("weather", '{"note": "null"}'), ("now", "{}")],
    ),
    (
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {PARIS}}}]',
        "",
        "",
        [("weather", PARIS)],
    ),
    (
        MISTRAL,
        f"ok [TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]now[ARGS]{{}}",
        "ok",
        "",
        [("weather", PARIS), ("now", "{}")],
    ),
    (LLAMA, f'{{"name": "weather", "parameters": {PARIS}}}', "", "", [("weather", PARIS)]),
    (
        LLAMA,
        f'<|python_tag|>{{"name": "weather", "parameters": {PARIS}}}; {{"name": "now"}}',
        "",
        "",
        [("weather", PARIS), ("now", "{}")],
    ),
    (
        THINK + DEEPSEEK,
        f"a</think>b<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{PARIS}<｜tool▁call▁end｜>"
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        "a</think>b",
        "",
        [("weather", PARIS), ("now", "{}")],
    ),
    (
        KIMI,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        f"<|tool_call_argument_begin|>{PARIS}<|tool_call_end|><|tool_calls_section_end|>",
        "",
        "",
        [("weather", PARIS)],
    ),
    (
        '<|tool_call>{"<tool_call|>"}',
        '<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>'
        '<|tool_call>call:weather{note:<|"|>a, b:"c"<|"|>,x:{y:[true,<|"|>é<|"|>]}}<tool_call|>',
        "",
        "",
        [("weather", PARIS), ("weather", '{"note": "a, b:\\"c\\"", "x": {"y": [true, "é"]}}')],
    ),
]  # fmt: skip
# What cannot be read stays text, all of it.
TEXT_ONLY = [
    (HERMES, 'a <tool_call>{"name": "weather", "arguments": [1]}</tool_call> b'),
    (HERMES, 'a\n<tool_call>\n{"name": "weather", "argum'),
    (HERMES, "<tool_call>no call</tool_call> \n<tool_call></tool_call>"),
    (HERMES, "<tool_call><function=weather>Paris</function></tool_call>"),
    (HERMES, "\n a <tool_ca"),
    (HERMES, '<tool_call>{"name": "weather", "arguments": {"days": NaN}}</tool_call>'),
    (MISTRAL, "x [TOOL_CALLS] weather(Paris)"),
    (LLAMA, f'{{"name": "Paris", "parameters": {PARIS}}}'),
    (LLAMA, '  {"city": "Paris"}'),
    (LLAMA, "<|python_tag|>weather.call(city='Paris')"),
    (LLAMA, f'I call {{"name": "weather", "parameters": {PARIS}}}'),
    (DEEPSEEK, "<｜tool▁calls▁begin｜>weather<｜tool▁calls▁end｜>"),
    ("", '<tool_call>{"name": "weather"}</tool_call>'),
]


def tokenizer_of(source: str) -> Tokenizer:
    return Tokenizer(byte_level(), {}, ChatTemplate(source))


def parts(answer: Answer) -> tuple[str, str, list[tuple[str, str]]]:
    calls = [(call.recipient, call.arguments) for call in answer.tool_calls]
    return answer.content, answer.reasoning, calls


def read(source: str, text: str, prompt: str = "", **options: Any) -> Answer:
    tokenizer = tokenizer_of(source)
    ids, prompt_ids = (tokenizer.encode(each, special=False) for each in (text, prompt))
    return read_answer(tokenizer, ids, prompt_ids, AnswerOptions(chat=True, **options))


@pytest.fixture(autouse=True)
def _without_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small tokenizer has harmony's markers; these models do not."""
    monkeypatch.setattr("getp.text.answer_text.supports_harmony", lambda tokenizer: False)


@pytest.mark.parametrize(("source", "text", "content", "reasoning", "calls"), ANSWERS)
def test_parts_of_an_answer(
    source: str, text: str, content: str, reasoning: str, calls: list[tuple[str, str]]
) -> None:
    assert parts(read(source, text, tools=TOOLS)) == (content, reasoning, calls)
    # Token by token, as with stop strings.
    assert parts(read(source, text, tools=TOOLS, stops=("STOP",))) == (content, reasoning, calls)
    if calls:  # nothing is read that was not asked for
        assert parts(read(source, text))[2] == []


@pytest.mark.parametrize(("source", "text"), TEXT_ONLY)
def test_what_is_not_a_call_stays_text(source: str, text: str) -> None:
    assert parts(read(source, text, tools=TOOLS)) == (text, "", [])


_CASES = [(each[0], each[1]) for each in ANSWERS] + TEXT_ONLY


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(_CASES), st.lists(st.integers(1, 12), min_size=1, max_size=30), st.booleans()
)
def test_parts_do_not_depend_on_how_text_arrives(
    case: tuple[str, str], lengths: list[int], is_open: bool
) -> None:
    tokenizer = tokenizer_of(case[0])
    prompt = tokenizer.encode("<think>\n" if is_open else "?", special=False)
    options = AnswerOptions(chat=True, tools=TOOLS)
    whole = AnswerText(tokenizer, prompt, options)
    assert whole._parts is not None
    pieces, rest = [], case[1]
    for length in [*lengths, len(rest)]:
        pieces += whole._parts._separate(rest[:length])
        rest = rest[length:]
    pieces += whole.flush()
    found = read_answer(tokenizer, tokenizer.encode(case[1], special=False), prompt, options)
    assert parts(_join(pieces)) == parts(found)


def test_an_answer_begins_in_the_thinking_that_the_prompt_opened() -> None:
    text = "hm\n</think>\n\n4"
    assert parts(read(THINK, text, "?<think>\n")) == ("4", "hm", [])
    assert parts(read(THINK, text, "?<think>\n\n</think>\n\n")) == (text, "", [])
    raw = read_answer(
        tokenizer_of(THINK), byte_level().encode(text).ids, byte_level().encode("<think>").ids,
        AnswerOptions(),
    )  # fmt: skip
    assert raw.content == text


@pytest.mark.parametrize("source", [HERMES, MISTRAL, LLAMA, DEEPSEEK, KIMI, "<|tool_call>"])
def test_hostile_answers_are_read_in_linear_time(source: str) -> None:
    form = format_of(ChatTemplate(source))
    assert form is not None
    starts = ("", "f", "<function=f>", "<arg_key>", "call:f{", "<|tool_call_begin|>",
              "<｜tool▁call▁begin｜>f<｜tool▁sep｜>")  # fmt: skip
    for start in starts:
        for filler in (" ", "\n", "1:", "{", "</parameter>", "<arg_key>", "<｜tool▁sep｜>"):
            form.read(start + filler * 100_000, TOOLS)  # a hang fails the test run


def test_results_are_compared_without_thinking() -> None:
    template = ChatTemplate(THINK)
    for text in ("<think>hm</think>\n4", "hm</think>4"):
        assert without_thinking(template, text) == "4"
        assert without_thinking(None, text) == text
    assert without_thinking(template, "<think>hm") == "<think>hm"


def test_stop_strings_and_the_first_call_end_an_answer() -> None:
    stopped = read(THINK, "<think>a STOP</think>b STOP c", stops=("STOP",))
    assert parts(stopped) == ("b ", "a STOP", [])
    two = '<tool_call>{"name":"now"}</tool_call>' * 2
    for stops in ((), ("STOP",)):
        assert parts(read(HERMES, two, tools=TOOLS, one_call=True, stops=stops))[2] == [
            ("now", "{}")
        ]


def test_ids_of_calls_are_kept_where_the_model_writes_them() -> None:
    answer = read(KIMI, ANSWERS[-2][1], tools=TOOLS)
    assert [call.id for call in answer.tool_calls] == ["functions.weather:0"]
    surrogate = '<tool_call>{"name": "now", "arguments": {"x": "\\ud800é"}}</tool_call>'
    (call,) = read(HERMES, surrogate, tools=TOOLS).tool_calls
    assert json.loads(call.arguments) == {"x": "\ud800é"}
    call.arguments.encode()


def test_markers_that_are_special_tokens_reach_the_parsers() -> None:
    backend = type(byte_level()).from_str(byte_level().to_str())
    backend.add_special_tokens(["<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "<other>"])
    tokenizer = Tokenizer(backend, {}, ChatTemplate(THINK + MISTRAL))
    text = f"<think>{TEXTS[0]}</think>ok<other>[TOOL_CALLS]now[ARGS]{{}}"
    ids = tokenizer.encode(text, special=False)
    for stops in ((), ("STOP",)):
        options = AnswerOptions(chat=True, tools=TOOLS, stops=stops)
        assert parts(read_answer(tokenizer, ids, [], options)) == ("ok", TEXTS[0], [("now", "{}")])
