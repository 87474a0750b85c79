import json
from pathlib import Path

import pytest

from tests.getp.helpers import CHAT_TEMPLATE, small_tokenizer, write_tokenizer
from tokenizer import (
    ChatTemplate,
    HarmonyParser,
    TemplateError,
    Tokenizer,
    TokenizerError,
    answer_text,
    sandbox,
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
    text = ours.template.render(CONVERSATION, add_generation_prompt=prompt)
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
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(TokenizerError):
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


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "iterations",
        ),
        ("{% for i in range(999999999) %}{% endfor %}", "too big"),
        ("{{ 'x' * 999999999 }}", "more than"),
        ("{{ 999999999 * [1] }}", "more than"),
        ("{{ 99 ** 99999 }}", "power"),
        ("{{ '%*d' % (999999999, 1) }}", "width"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        (
            "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
            "{% endfor %}",
            "more than",
        ),
        (
            "{% set n = namespace(x='xx') %}{% for i in range(60) %}"
            "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
            "more than",
        ),
        (
            "{% set n = namespace(x='xx') %}{% for i in range(60) %}"
            "{% set n.x = n.x | replace('x', 'xxx') %}{% endfor %}",
            "more than",
        ),
        (
            "{% set n = namespace(x='xx') %}{% for i in range(60) %}"
            "{% set n.x = n.x.replace('x', 'xxx') %}{% endfor %}",
            "more than",
        ),
        (
            "{% set x = 'x' * 1000000 %}{% for i in range(1000) %}{% set y = x ~ i %}{% endfor %}",
            "more than",
        ),
        ("{{ 'x' | center(999999999) }}", "more than"),
        ("{{ 'x'.ljust(999999999) }}", "more than"),
        ("{{ 'x'.zfill(width=999999999) }}", "more than"),
        ("{{ 'x\ny' | indent(999999999) }}", "more than"),
        ("{{ '\t'.expandtabs(999999999) }}", "more than"),
        ("{{ range(90000) | join('x' * 9000) }}", "more than"),
        ("{{ ('x' * 9000).join(['a'] * 90000) }}", "more than"),
        ("{{ ('{0}' * 90000).format('x' * 9000) }}", "more than"),
        ("{{ '{:999999999}'.format(1) }}", "width"),
        ("{{ ('%s' * 2) % ('x' * 60000000, 'y') }}", "more than"),
        ("{{ '%999999999d' | format(1) }}", "width"),
        ("{{ 'x'.translate({120: 'y' * 999}) }}", "translate, which is not supported"),
        ("{{ [1] | batch(999999999, 0) | list }}", "more than"),
        ("{{ lipsum(999999) }}", "undefined"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        (
            "{% for i in range(70000) %}{{ 'x' * 1000 }}{% endfor %}",
            "more than",
        ),
    ],
)
def test_templates_that_exceed_a_limit_or_leave_the_sandbox_fail(
    template: str, message: str
) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(template).render(CONVERSATION)


@pytest.mark.parametrize(
    "step",
    [
        "{% set n.x = [n.x, n.x] %}",
        "{% set n.x = (n.x, n.x) %}",
        "{% set n.x = {1: n.x, 2: n.x} %}",
        "{% set n.x = [n.x] * 2 %}",
        "{% set n.x = [n.x] + [n.x] %}",
        "{% set n.x = dict(a=n.x, b=n.x) %}",
        "{% set n.x = [1] | batch(9, n.x) | list %}",
        "{% set n.x = [{}, {}] | map(attribute='y', default=n.x) | list %}",
        "{% macro m() %}{% set n.x = varargs %}{% endmacro %}{{ m(n.x, n.x) }}",
        "{% macro m() %}{% set n.x = kwargs %}{% endmacro %}{{ m(a=n.x, b=n.x) }}",
        "{% macro m() %}{% set n.x = varargs %}{{ caller() }}{% endmacro %}"
        "{% call m(n.x, n.x) %}{% endcall %}",
    ],
)
@pytest.mark.parametrize("use", ["{{ n.x }}", "{{ n.x | tojson }}", "{{ n.x == [n.x] }}"])
def test_nested_collections_cannot_grow_exponentially(step: str, use: str) -> None:
    loop = f"{{% for i in range(60) %}}{step}{{% endfor %}}"
    with pytest.raises(TemplateError, match="more than"):
        ChatTemplate("{% set n = namespace(x=[1]) %}" + loop + use).render(CONVERSATION)


def test_nested_namespaces_are_printed_without_their_content() -> None:
    steps = "".join(
        f"{{% set n{i} = namespace() %}}{{% set n{i}.a = n{i - 1} %}}{{% set n{i}.b = n{i - 1} %}}"
        for i in range(1, 60)
    )
    assert (
        ChatTemplate(f"{{% set n0 = 1 %}}{steps}{{{{ n59 }}}}").render(CONVERSATION)
        == "<namespace>"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}"
            "{% endfor %}",
            "number that is too large",
        ),
        ("{{ ('f' * 100000) | int(0, 16) // 3 }}", "number that is too large"),
        (
            "{% set n = namespace(x=[1]) %}{% for i in range(500) %}{% set n.x = [n.x] %}"
            "{% endfor %}{{ [n.x] * 9999 | int }}{{ ([n.x] * 9999) | tojson(indent=9999) }}",
            "more than",
        ),
        (
            "{% set x = 'x' * 9000000 %}{% for i in range(100000) %}{% if x | upper == 'y' %}"
            "{% endif %}{% endfor %}",
            "more than 1 seconds",
        ),
    ],
)
def test_numbers_and_cpu_time_are_limited(
    template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_MAX_SECONDS", 1.0)
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(template).render(CONVERSATION)


def test_limits_do_not_change_the_results_of_operations() -> None:
    for template, text in {
        "{{ 'a' ~ 1 ~ none }}": "a1None",
        "{{ 'a-b-c' | replace('-', '+') }}{{ 'a-b-c'.replace('-', '', 1) }}": "a+b+cab-c",
        "{{ 'a-b' | replace(old='-', new='') }}": "ab",
        "{{ [1, 2] | join(', ') }}{{ messages | join('/', attribute='role') }}": None,
        "{{ ', '.join(['a', 'b']) }}{{ 'x'.center(3) }}{{ 'x' | center(3) }}": "a, b x  x ",
        "{{ 'a\nb' | indent(2) }}{{ 'a\nb' | indent('> ', true) }}": "a\n  b> a\n> b",
        "{{ '{:>4}|{}'.format(1, 'x') }}{{ '%03d %s' % (7, 'y') }}": "   1|x007 y",
        "{{ '%s and %s' | format(1, 2) }}": "1 and 2",
        "{{ [1, 2, 3] | batch(2, 0) | list }}": "[[1, 2], [3, 0]]",
        "{% set x %}a{{ 'b' }}{% endset %}{{ x ~ x }}": "abab",
        "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1) ~ m('y') }}": "<1><y>",
        "{% filter upper %}a{{ 'b' | lower }}{% endfilter %}": "AB",
        "{{ {'a': [1, (2, 3)]} | tojson }}": '{"a": [1, [2, 3]]}',
        "{{ [1] | tojson(indent=1) }}": "[\n 1\n]",
        "{% for a, b in [(1, 2)] %}{{ a + b }}{% endfor %}{% set c, d = 3, 4 %}{{ c * d }}": "312",
        "{{ 7 // 2 - 1 / 2 }}{{ 2 in [1, 2] and 1 is odd }}": "2.5True",
        "{{ '  a '.strip() }}{{ 'a,b'.split(',') | length }}": "a2",
    }.items():
        found = ChatTemplate(template).render(CONVERSATION)
        if text is not None:
            assert found == text
        else:
            assert found == "1, 2" + "/".join(str(message["role"]) for message in CONVERSATION)


def test_unusable_templates_are_rejected_when_loaded(tmp_path: Path) -> None:
    for source in ("{% for x in", "{% for x in y recursive %}{% endfor %}", "x" * 2**21):
        with pytest.raises(TokenizerError, match="chat template is"):
            ChatTemplate(source)
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template.jinja cannot be read"):
        Tokenizer.load(folder)


def test_variables_lists_the_names_that_a_template_uses() -> None:
    assert "reasoning_effort" in ChatTemplate("{{ reasoning_effort }}").variables
    assert "reasoning_effort" not in ChatTemplate(CHAT_TEMPLATE).variables
