"""Mode generate: complete one prompt, streamed to the terminal."""

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from getp.cli import loading
from getp.cli.settings import PromptOptions, Settings
from getp.cli.wording import option_name
from getp.errors import GetpError, UsageProblem
from getp.files import STDIO, read_bytes
from getp.terminal import print_message

if TYPE_CHECKING:
    from engine import SamplingParams
    from getp.text.chat_session import ChatSettings
    from tokenizer import Tokenizer


def run(settings: Settings) -> int:
    """Complete the prompt; return the exit status. Raises GetpError."""
    given = settings.prompt
    if given.system is not None and given.chat_template is False:
        raise UsageProblem("-y/--system needs the chat template: remove --raw")
    if given.chat_template is False:
        loading.check_variables(settings)
    from getp.defaults import TEXT
    from getp.text import chat_session

    prompt = prompt_text(given.input)
    tokenizer = loading.load_tokenizer(settings)
    engine = loading.load_engine(one_at_a_time(settings))
    by_template = _by_template(given, tokenizer)
    params = loading.sampling_params(settings, tokenizer, TEXT)
    chat = chat_settings(settings, params, by_template)
    if by_template and given.chat_template is None:
        print_message(
            "getp: using the model's chat template (--raw: complete the bare text)", dim=True
        )
    if by_template:
        loading.check_thinking(settings, tokenizer)
    chat_session.generate(chat, prompt, tokenizer, engine)
    return 0


def _by_template(given: PromptOptions, tokenizer: "Tokenizer") -> bool:
    """Return whether the prompt goes through the chat template: by default if there is one.

    A model that was trained on its template often ends its answer to bare text at once.
    """
    if given.chat_template is not None:
        return given.chat_template
    return tokenizer.template is not None or given.system is not None


def chat_settings(settings: Settings, params: "SamplingParams", chat: bool) -> "ChatSettings":
    """Return the settings for answers on the terminal; chat: apply the chat template."""
    from getp.text.chat_session import ChatSettings

    return ChatSettings(
        params,
        loading.answer_options(settings, chat),
        settings.prompt.system,
        settings.prompt.variables,
        settings.sampling.thinking_budget,
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
        raise UsageProblem("the prompt is empty: give it with -i/--input TEXT, or pipe it in")
    if os.path.isfile(given):
        print_message(
            f"getp: in mode generate -i/--input is the prompt itself; -m getp runs the file {given}"
        )
    return given
