import json
from pathlib import Path

import pytest

from tests.getp_helpers import CHAT_TEMPLATE, small_tokenizer, write_tokenizer
from tokenizer import (
    ChatTemplate,
    HarmonyParser,
    TemplateError,
    Tokenizer,
    TokenizerError,
    answer_text,
)
from tokenizer.harmony import speaks_harmony

TALK = [
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
    expected = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=prompt)
    assert ours.template is not None
    text = ours.template.render(TALK, add_generation_prompt=prompt)
    assert text == expected
    their_ids = theirs.apply_chat_template(TALK, add_generation_prompt=prompt)["input_ids"]
    assert ours.encode(text, special=False) == their_ids


def test_a_template_is_found_in_the_config_as_text_or_by_name(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, template=None)
    assert Tokenizer.load(folder).template is None
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    for value in ("yes", named):
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        template = Tokenizer.load(folder).template
        assert template is not None
        assert template.render(TALK) == "yes"


def test_a_template_may_refuse_a_conversation_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TokenizerError, match="roles must alternate"):
        template.render(TALK)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% nothing %}"])
def test_an_invalid_template_is_one_clear_error(source: str) -> None:
    with pytest.raises(TokenizerError, match="chat template is not valid"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ],
)
def test_a_template_stays_in_its_sandbox(source: str) -> None:
    with pytest.raises(TokenizerError):
        ChatTemplate(source).render(TALK)


ANSWER = (
    "<|channel|>analysis<|message|>12 and 30 é<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json"
    "<|message|>{}<|call|>"
    "<|start|>assistant<|channel|>final<|message|>It is 42 🙂.<|return|>"
)


def test_an_answer_is_split_into_its_channels() -> None:
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


def test_a_tokenizer_without_the_markers_has_plain_answers() -> None:
    from tests.getp_helpers import metaspace

    plain = Tokenizer(metaspace())
    assert not speaks_harmony(plain)
    assert speaks_harmony(small_tokenizer())
    assert answer_text(plain, plain.encode("a bad head")) == "a bad head"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "round"),
        ("{% for i in range(999999999) %}{% endfor %}", "too big"),
        ("{{ 'x' * 999999999 }}", "more than"),
        ("{{ 999999999 * [1] }}", "more than"),
        ("{{ 99 ** 99999 }}", "power"),
        ("{{ '%*d' % (999999999, 1) }}", "width"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        (
            "{% for i in range(70000) %}{{ 'x' * 1000 }}{% endfor %}",
            "more than",
        ),
    ],
)
def test_a_template_has_limits_and_no_way_out(template: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        ChatTemplate(template).render(TALK)


def test_a_template_that_is_no_template_is_refused(tmp_path: Path) -> None:
    for source in ("{% for x in", "{% for x in y recursive %}{% endfor %}", "x" * 2**21):
        with pytest.raises(TokenizerError, match="chat template is"):
            ChatTemplate(source)
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template.jinja cannot be read"):
        Tokenizer.load(folder)


def test_a_template_says_which_names_it_asks_for() -> None:
    assert "reasoning_effort" in ChatTemplate("{{ reasoning_effort }}").variables
    assert "reasoning_effort" not in ChatTemplate(CHAT_TEMPLATE).variables
