"""Mode chat: an interactive chat on the terminal."""

from getp.cli import loading
from getp.cli.modes.generate import chat_settings, one_at_a_time
from getp.cli.settings import Settings
from getp.errors import UsageProblem


def run(settings: Settings) -> int:
    """Chat until the user quits; return the exit status. Raises GetpError."""
    if settings.prompt.chat_template is False:
        raise UsageProblem("--raw does not apply to mode chat, which needs the chat template")
    from getp.defaults import CHAT
    from getp.text import chat_session

    tokenizer = loading.load_tokenizer(settings)
    loading.check_thinking(settings, tokenizer)
    engine = loading.load_engine(one_at_a_time(settings))
    chat = chat_settings(settings, loading.sampling_params(settings, tokenizer, CHAT), chat=True)
    chat_session.chat(chat, settings.prompt.input, tokenizer, engine)
    return 0
