import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine import SamplingParams
from getp.cli import loading, main
from getp.cli.modes.generate import prompt_text
from getp.errors import GetpError, Interrupted, UsageProblem
from getp.text import chat_session
from getp.text.answer_text import AnswerOptions
from getp.text.chat_session import ChatSettings
from getp.text.screen import Screen
from tests.getp.helpers import (
    FakeEngine,
    fake_engine,
    metaspace,
    small_tokenizer,
    write_tokenizer,
)
from tokenizer import Tokenizer
from tokenizer.harmony import ChannelText

TOKENIZER = small_tokenizer()
SETTINGS = ChatSettings(
    SamplingParams(max_positions=500, stop_ids=TOKENIZER.stop_ids), AnswerOptions(chat=True)
)
FINAL = "<|channel|>final<|message|>"

RunChat = Callable[..., tuple[str, str]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunChat:
    """Run a chat on piped lines; return what it wrote to standard output and error."""

    def run(lines: str, engine: Any, **changes: Any) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        first = changes.pop("first", None)
        settings = ChatSettings(**{**vars(SETTINGS), **changes})
        chat_session.chat(settings, first, TOKENIZER, engine)
        out, err = capsys.readouterr()
        return out, err

    return run


def always_answers(text: str) -> Callable[[Sequence[int]], Sequence[int]]:
    return lambda prompt: TOKENIZER.encode(text)


def prompts(engine: FakeEngine) -> list[str]:
    return [TOKENIZER.decode(r.prompt_ids, skip_special=False) for r in engine.requests]


def test_earlier_turns_keep_only_their_final_text(run_chat: RunChat) -> None:
    thinking = "<|channel|>analysis<|message|>hm 🙂<|end|><|start|>assistant"
    engine = FakeEngine(always_answers(thinking + FINAL + "It is 4.<|return|>"))
    out, err = run_chat("2+2?\nsure?\n", engine)
    assert out == "It is 4.\nIt is 4.\n"
    assert err.count("[analysis] hm 🙂\n") == 2
    assert prompts(engine)[1] == (
        "<|start|>user<|message|>2+2?<|end|><|start|>assistant<|message|>It is 4.<|end|>"
        "<|start|>user<|message|>sure?<|end|><|start|>assistant"
    )


def test_a_preamble_is_shown_and_a_tool_call_names_its_recipient(run_chat: RunChat) -> None:
    answer = (
        "<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f<|message|>{}<|end|>"
        "<|start|>assistant" + FINAL + "It is 4.<|return|>"
    )
    out, err = run_chat("2+2?\n", FakeEngine(always_answers(answer)))
    assert out == "I look.\nIt is 4.\n"
    assert "[commentary to functions.f] {}\n" in err


def test_summary_of_an_answer_shows_its_speed_and_cached_tokens(run_chat: RunChat) -> None:
    engine = FakeEngine(always_answers(FINAL + "4<|return|>"))
    _, err = run_chat("hi\n", engine)
    count = len(engine.requests[0].prompt_ids)
    assert f", 2 of {count} prompt tokens cached, truncated at the length limit]" in err
    assert "9.0 tok/s" in err  # the fake engine takes one second for nine tokens


def test_summary_says_that_an_answer_is_empty(run_chat: RunChat) -> None:
    _, err = run_chat("hi\n", FakeEngine(always_answers("<eos>")))
    assert err.endswith("prompt tokens cached, the answer is empty]\n")


def test_slash_commands_change_the_conversation(run_chat: RunChat) -> None:
    engine = FakeEngine(always_answers(FINAL + "ok<|return|>"))
    lines = "one\n/system be kind\ntwo\n/reset\n\nthree\n/system\nfour\n/help\n/what\n/quit\nno\n"
    out, err = run_chat(lines, engine, system="first")
    assert out == "ok\n" * 4
    one, two, three, four = prompts(engine)
    assert one.startswith("<|start|>system<|message|>first<|end|><|start|>user<|message|>one")
    assert two.startswith("<|start|>system<|message|>be kind<|end|><|start|>user<|message|>one")
    assert three.startswith("<|start|>system<|message|>be kind<|end|><|start|>user<|message|>three")
    assert four.startswith("<|start|>user<|message|>three")
    assert "/system TEXT" in err
    assert "unknown command /what" in err


def test_first_message_can_be_given_on_the_command_line(run_chat: RunChat) -> None:
    engine = FakeEngine(always_answers(FINAL + "ok<|return|>"))
    assert run_chat("", engine, first="hello")[0] == "ok\n"


def test_ctrl_c_stops_the_answer_but_not_the_chat(run_chat: RunChat) -> None:
    presses = iter([signal.SIGINT])

    def answer(prompt: Sequence[int]) -> Iterator[int]:
        yield from TOKENIZER.encode(FINAL + "some")
        for press in presses:  # in the first answer only
            os.kill(os.getpid(), press)
        yield from TOKENIZER.encode(" words that go on")

    engine = FakeEngine(answer)
    before = signal.getsignal(signal.SIGINT)
    out, err = run_chat("go\nagain\n", engine)
    assert signal.getsignal(signal.SIGINT) is before
    half, whole = out.splitlines()
    assert whole == "some words that go on"
    assert whole.startswith(half)
    assert len(half) < len(whole)
    assert err.count("stopped]") == 1
    assert f"assistant<|message|>{half}<|end|>" in prompts(engine)[1]


def test_too_long_conversation_is_refused_and_the_chat_continues(run_chat: RunChat) -> None:
    engine = FakeEngine(always_answers(FINAL + "ok<|return|>"), max_positions=60)
    out, err = run_chat("x" * 100 + "\n" + "hi\n" * 20, engine)
    assert out.startswith("ok\nok\n")
    alone, conversation, *_ = (line for line in err.splitlines() if "limit is 60" in line)
    assert "the message alone" in alone
    assert "/reset" not in alone
    assert "/reset" in conversation


def test_a_chat_limited_by_the_kv_cache_names_its_option(run_chat: RunChat) -> None:
    engine = FakeEngine(always_answers(FINAL + "ok<|return|>"), max_positions=4096)
    engine.max_positions = 60  # as after warm_up with little memory
    _, err = run_chat("x" * 100 + "\n", engine)
    assert "limit is 60 tokens" in err
    assert "with more kv_memory (the model's limit is 4096)" in err


@pytest.mark.parametrize(("options", "refused"), [([], False), (["-n", "1024"], True)])
def test_a_chat_is_limited_by_the_model_unless_a_length_is_given(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    refused: bool,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    folder = str(write_tokenizer(tmp_path))
    engine = FakeEngine(always_answers(FINAL + "an answer<|return|>"))
    monkeypatch.setattr(loading, "load_engine", lambda settings: engine)
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 2000 + "\n"))
    assert main.run([folder, "-m", "chat", *options]) == 0
    out, err = capsys.readouterr()
    assert ("an answer" in out) != refused
    assert ("the limit is 1024 tokens" in err) == refused


def test_a_path_or_a_comment_is_a_message_and_not_a_command(run_chat: RunChat) -> None:
    engine = FakeEngine(always_answers(FINAL + "ok<|return|>"))
    out, _ = run_chat("/home/me/file.py is empty\n// a comment\n /quit\nno\n", engine)
    assert out == "ok\nok\n"
    assert "/home/me/file.py is empty" in prompts(engine)[0]


def test_a_system_prompt_keeps_its_lines(run_chat: RunChat) -> None:
    engine = FakeEngine(always_answers(FINAL + "ok<|return|>"))
    run_chat("/system  be kind \nhi\n", engine)
    assert prompts(engine)[0].startswith("<|start|>system<|message|>be kind<|end|>")


def test_error_of_the_chat_template_does_not_end_the_chat(
    run_chat: RunChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}hi"
    monkeypatch.setattr(sys.modules[__name__], "TOKENIZER", small_tokenizer(refusing))
    _, err = run_chat("a\nb\n/reset\nc\n", fake_engine(lambda prompt: [5]))
    assert "one only" in err


def test_chat_without_a_chat_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GetpError, match=r"no chat template.* with tokenizer"):
        chat_session.chat(SETTINGS, None, small_tokenizer(None), fake_engine())


def test_generate_streams_complete_characters(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ChatSettings(SamplingParams())
    text = "naïve 🙂 déjà"
    chat_session.generate(settings, "hi", TOKENIZER, fake_engine(always_answers(text)))
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert "tok/s" in err


def test_generate_stops_before_a_stop_string(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ChatSettings(SamplingParams(), AnswerOptions(stops=("END",)))
    chat_session.generate(settings, "hi", TOKENIZER, fake_engine(always_answers("words EEND more")))
    assert capsys.readouterr().out == "words E\n"


def test_text_held_back_for_a_stop_string_is_shown_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ChatSettings(SamplingParams(), AnswerOptions(stops=("END",)))
    chat_session.generate(settings, "hi", TOKENIZER, fake_engine(always_answers("words EN")))
    assert capsys.readouterr().out == "words EN\n"


def test_generate_works_with_a_sentencepiece_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    plain = Tokenizer(metaspace())
    chat_session.generate(ChatSettings(SamplingParams()), "a bad head é", plain, fake_engine())
    assert capsys.readouterr().out == "a bad head é\n"


def test_generate_raises_the_error_of_the_engine() -> None:
    with pytest.raises(GetpError, match="too long"):
        chat_session.generate(
            ChatSettings(SamplingParams(max_positions=2)), "hello", TOKENIZER, fake_engine()
        )


def test_ctrl_c_ends_generate_after_the_text_so_far(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(prompt: Sequence[int]) -> Sequence[int]:
        os.kill(os.getpid(), signal.SIGINT)
        return prompt

    with pytest.raises(Interrupted):
        chat_session.generate(
            ChatSettings(SamplingParams()), "hello", TOKENIZER, fake_engine(answer)
        )
    assert len(capsys.readouterr().out) <= len("hello\n")


def test_prompt_comes_from_the_option_or_from_standard_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pipe(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    assert prompt_text("given") == "given"
    pipe("two\nlines é\n".encode())
    assert prompt_text(None) == "two\nlines é"
    pipe(b"\xff")
    with pytest.raises(GetpError, match="not UTF-8"):
        prompt_text("-")
    pipe(b"\n")
    with pytest.raises(UsageProblem, match="empty"):
        prompt_text(None)
    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(UsageProblem, match="-i/--input"):
        prompt_text(None)


def test_a_prompt_that_names_a_file_is_completed_with_a_notice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prompt_text(__file__) == __file__
    assert f"-m getp runs the file {__file__}" in capsys.readouterr().err


def test_control_characters_of_the_model_do_not_reach_a_terminal() -> None:
    out, aside = Terminal(), Terminal()
    screen = Screen(out, aside)
    screen.show(ChannelText("analysis", "a\x1b[31mb\x07"))
    screen.show(ChannelText("final", "c\r\x9b2Jd\te\x7f"))
    screen.end()
    assert aside.getvalue() == "\x1b[2m[analysis] a[31mb\x1b[0m\n"
    assert out.getvalue() == "c2Jd\te\n"


def test_files_and_pipes_get_the_text_unchanged() -> None:
    out, aside = io.StringIO(), io.StringIO()
    screen = Screen(out, aside)
    screen.show(ChannelText("final", "c\x1b[31m\n"))
    screen.end()
    assert out.getvalue() == "c\x1b[31m\n"
