"""Mode generate: complete one prompt, streamed to the terminal."""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from getp.cli import loading
from getp.cli.settings import Settings
from getp.cli.wording import option_name
from getp.errors import GetpError, UsageProblem
from getp.files import STDIO, read_bytes

if TYPE_CHECKING:
    from engine import SamplingParams
    from getp.text.chat_session import ChatSettings


def run(settings: Settings) -> int:
    """Complete the prompt; return the exit status. Raises GetpError."""
    loading.check_system(settings)
    from getp.text import chat_session

    prompt = prompt_text(settings.prompt.input)
    tokenizer = loading.load_tokenizer(settings)
    engine = loading.load_engine(one_at_a_time(settings))
    chat = chat_settings(settings, loading.sampling_params(settings, tokenizer))
    chat_session.generate(chat, prompt, tokenizer, engine)
    return 0


def chat_settings(settings: Settings, params: "SamplingParams") -> "ChatSettings":
    """Return the settings for answers on the terminal."""
    from getp.text.chat_session import ChatSettings

    return ChatSettings(
        params,
        stops=settings.sampling.stop,
        chat=bool(settings.prompt.chat_template),
        system=settings.prompt.system,
        name_of=option_name,
    )


def one_at_a_time(settings: Settings) -> Settings:
    """Return the settings with a batch size of 1, unless another was given."""
    size = settings.engine.max_batch_size or 1
    return replace(settings, engine=replace(settings.engine, max_batch_size=size))


def prompt_text(given: str | None) -> str:
    """Return the prompt: `-i`, or standard input. Raises GetpError."""
    if given is None and sys.stdin.isatty():
        raise UsageProblem("mode generate needs a prompt: -i/--input TEXT, or pipe it in")
    if given is None or given == STDIO:
        try:
            given = read_bytes(STDIO).decode("utf-8")
        except UnicodeDecodeError as error:
            raise GetpError(f"the prompt on standard input is not UTF-8: {error}") from error
        given = given.removesuffix("\n").removesuffix("\r")  # `echo` adds it
    if not given:
        raise UsageProblem("the prompt (-i/--input) must not be empty")
    return given
