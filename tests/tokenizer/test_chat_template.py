import json
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.getp.helpers import CHAT_TEMPLATE, small_tokenizer, write_tokenizer
from tokenizer import (
    ChatTemplate,
    HarmonyParser,
    TemplateError,
    Tokenizer,
    TokenizerError,
    answer_text,
)
from tokenizer.harmony import supports_harmony

CONVERSATION = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "naïve 你好?\n"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "why"},
]
LLAMA = """{{ bos_token }}{% for message in messages %}
  {% if message['role'] == 'system' %}
[SYS]{{ message['content'] | trim }}[/SYS]
    {% continue %}
  {% endif %}
  {% generation %}[{{ loop.index0 }}]{{ message['content'] | tojson }}{% endgeneration %}
{% endfor %}
{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}
{{ ns.n }}{{ {'a': [1, "é"]} | tojson(indent=2) }}{% if add_generation_prompt %}[A]{% endif %}"""
DATED = "{{ strftime_now('%Y') }}{% if tools is none %}x{% endif %}{{ documents }}{{ eos_token }}"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA, DATED])
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_in_transformers(tmp_path: Path, template: str, prompt: bool) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_tokenizer(tmp_path, template)
    ours = Tokenizer.load(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    expected = theirs.apply_chat_template(
        CONVERSATION, tokenize=False, add_generation_prompt=prompt
    )
    assert ours.template is not None
    text = ours.template.render(CONVERSATION, {"add_generation_prompt": prompt})
    assert text == expected
    their_ids = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=prompt)["input_ids"]
    assert ours.encode(text, special=False) == their_ids


def test_a_template_in_tokenizer_config_is_a_string_or_a_list_of_named_templates(
    tmp_path: Path,
) -> None:
    folder = write_tokenizer(tmp_path, template=None)
    assert Tokenizer.load(folder).template is None
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    for value in ("yes", named):
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        template = Tokenizer.load(folder).template
        assert template is not None
        assert template.render(CONVERSATION) == "yes"


def test_an_error_raised_by_a_template_keeps_its_message() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TokenizerError, match="roles must alternate"):
        template.render(CONVERSATION)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% nothing %}"])
def test_an_invalid_template_raises_a_clear_error(source: str) -> None:
    with pytest.raises(TemplateError, match="the chat template is not valid"):
        ChatTemplate(source).render(CONVERSATION)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(TemplateError, match="unsafe"):
        ChatTemplate(source).render(CONVERSATION)


ANSWER = (
    "<|channel|>analysis<|message|>12 and 30 é<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json"
    "<|message|>{}<|call|>"
    "<|start|>assistant<|channel|>final<|message|>It is 42 🙂.<|return|>"
)


def test_an_answer_is_split_into_channels() -> None:
    tokenizer = small_tokenizer()
    prompt = tokenizer.encode("<|start|>user<|message|>hi<|end|><|start|>assistant")
    parser = HarmonyParser(tokenizer, prompt)
    channels: dict[str, str] = {}
    for piece in [parser.push(i) for i in tokenizer.encode(ANSWER)] + [parser.flush()]:
        if piece is not None:
            assert "\ufffd" not in piece.text
            channels[piece.channel] = channels.get(piece.channel, "") + piece.text
    assert channels == {"analysis": "12 and 30 é", "commentary": "{}", "final": "It is 42 🙂."}


@pytest.mark.parametrize(
    ("header", "channel", "recipient"),
    [
        ("<|channel|>commentary", "final", None),
        ("<|channel|>commentary json", "final", None),
        ("<|channel|>final <|constrain|>json", "final", None),
        ("<|channel|>analysis", "analysis", None),
        ("<|channel|>commentary to=functions.f", "commentary", "functions.f"),
        ("<|channel|>commentary to=functions.f <|constrain|>json", "commentary", "functions.f"),
        ("<|channel|>commentary to=functions.f<|constrain|>json", "commentary", "functions.f"),
        (" to=functions.f<|channel|>commentary json", "commentary", "functions.f"),
        (" to=functions.f<|channel|>commentary<|constrain|>json", "commentary", "functions.f"),
        (" to=functions.f", "commentary", "functions.f"),
        ("<|channel|>analysis to=browser.search code", "analysis", "browser.search"),
        ("<|channel|>commentary to=assistant", "commentary", None),  # a tool's result
    ],
)
def test_a_message_is_for_the_user_unless_it_is_reasoning_or_calls_a_tool(
    header: str, channel: str, recipient: str | None
) -> None:
    tokenizer = small_tokenizer()
    parser = HarmonyParser(tokenizer, tokenizer.encode("<|start|>assistant"))
    ids = tokenizer.encode(header + "<|message|>x<|end|>")
    pieces = [*filter(None, map(parser.push, ids)), *filter(None, [parser.flush()])]
    assert {piece.channel for piece in pieces} == {channel}
    assert {piece.recipient for piece in pieces} == {recipient}
    assert "".join(piece.text for piece in pieces) == "x"


def test_messages_of_one_channel_are_separated_by_a_newline() -> None:
    tokenizer = small_tokenizer()
    text = (
        "<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>hm<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is 4.<|return|>"
    )
    ids = tokenizer.encode(text)
    assert (
        answer_text(tokenizer, ids, tokenizer.encode("<|start|>assistant")) == "I look.\nIt is 4."
    )


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("<|start|>assistant", ANSWER, "It is 42 🙂."),
        ("<|start|>assistant", "<|channel|>analysis<|message|>well", ""),
        ("<|start|>assistant", "<|message|>no channel<|return|>", "no channel"),
        ("<|start|>assistant<|channel|>final<|message|>", "open<|return|>", "open"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "hm<|end|>", ""),
        ("12 + 34?", " 46<eos>", " 46"),
        ("", ANSWER[: ANSWER.index("🙂")], "It is 42 "),
    ],
)
def test_the_answer_is_the_text_of_the_final_channel(prompt: str, answer: str, text: str) -> None:
    tokenizer = small_tokenizer()
    assert answer_text(tokenizer, tokenizer.encode(answer), tokenizer.encode(prompt)) == text


def test_without_harmony_markers_the_answer_is_the_whole_text() -> None:
    from tests.getp.helpers import metaspace

    plain = Tokenizer(metaspace())
    assert not supports_harmony(plain)
    assert supports_harmony(small_tokenizer())
    assert answer_text(plain, plain.encode("a bad head")) == "a bad head"


def test_a_template_that_cannot_be_used_is_an_error_where_it_is_used(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    for content in (
        b"{% for x in",
        b"x" * 2**21,
        b"\xff",
        b"{{ " + b"(" * 999 + b")" * 999 + b" }}",
    ):
        (folder / "chat_template.jinja").write_bytes(content)
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.decode(tokenizer.encode("two words")) == "two words"
        assert tokenizer.template is not None
        with pytest.raises(TemplateError, match="the chat template is"):
            tokenizer.template.variables  # noqa: B018 - compiles it
        with pytest.raises(TemplateError, match="the chat template is"):
            tokenizer.template.render(CONVERSATION)


def test_variables_replace_what_every_template_gets_but_not_the_messages() -> None:
    template = ChatTemplate("{{ add_generation_prompt }} {{ tools }} {{ messages | length }}")
    assert template.render(CONVERSATION) == "True None 4"
    given = {"add_generation_prompt": False, "tools": [1], "messages": []}
    assert template.render(CONVERSATION, given) == "False [1] 4"


def test_a_template_sees_the_given_time() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y %H:%M') }}")
    moment = datetime(2024, 7, 26, 13, 5)
    assert template.render(CONVERSATION, now=moment) == "26 Jul 2024 13:05"


def test_values_reach_a_template_as_they_are() -> None:
    values = {
        "half": "a\ud800b",
        "float": 0.1,
        "big": 10**30,
        "nan": float("nan"),
        "nested": MappingProxyType({"é": (1, None, True)}),
    }
    template = ChatTemplate("{{ half }}|{{ float }}|{{ big }}|{{ nan }}|{{ nested }}")
    expected = "a\ud800b|0.1|1000000000000000000000000000000|nan|{'é': [1, None, True]}"
    assert template.render(CONVERSATION, values) == expected
    with pytest.raises(TemplateError, match="a set is not JSON"):
        template.render(CONVERSATION, {"half": {1}})


def test_variables_lists_the_names_that_a_template_uses() -> None:
    assert "reasoning_effort" in ChatTemplate("{{ reasoning_effort }}").variables
    assert "reasoning_effort" not in ChatTemplate(CHAT_TEMPLATE).variables
