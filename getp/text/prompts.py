"""From a prompt's text to its token ids and its seed."""

from collections.abc import Sequence

from getp.errors import GetpError
from tokenizer import ChatTemplate, Message, Tokenizer

_MASK = 2**64 - 1
_LONG = 1 << 20  # characters that are not worth counting before they are encoded


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the tokenizer's chat template. Raises GetpError if it has none."""
    if tokenizer.template is None:
        raise GetpError(
            "this checkpoint has no chat template (neither a chat_template.jinja nor one in "
            "tokenizer_config.json): name a tokenizer directory that has one with -z/--tokenizer, "
            "or go without it (--raw; chat cannot)"
        )
    return tokenizer.template


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the prompt that asks for the next answer of a conversation."""
    text = chat_template(tokenizer).render(messages)
    return tokenizer.encode(text, special=False)  # the template has put the first token there


def check_length(tokenizer: Tokenizer, text: str, most: int) -> None:
    """Raise GetpError for a long text that must have more than `most` tokens.

    To make tokens of megabytes takes minutes and gigabytes, only to find too many of them.
    """
    if len(text) <= max(_LONG, most):
        return
    size = len(text.encode("utf-8", "replace"))
    if size > most * tokenizer.longest_token:
        raise GetpError(
            f"the prompt has {size} bytes and so more than {size // tokenizer.longest_token} "
            f"tokens, which leaves no room for output within the limit of {most} positions "
            "(of -n/--steps, or the model's own)"
        )


def encode_prompt(tokenizer: Tokenizer, text: str, chat: bool, system: str | None) -> list[int]:
    """Return one prompt's ids: `text` as it is, or as the only question of a chat."""
    if not chat:
        return tokenizer.encode(text)
    return encode_chat(tokenizer, [*system_message(system), {"role": "user", "content": text}])


def system_message(system: str | None) -> list[Message]:
    """Return the beginning of a conversation: the system prompt, if there is one."""
    return [{"role": "system", "content": system}] if system else []


def request_seed(seed: int, index: int) -> int:
    """Return the seed of request `index` in a job with `seed`, from 0 to 2⁶³ - 1.

    Equal prompts of one job must sample differently, and again the same in the next run.
    SplitMix64's output function (Steele, Lea, Flood 2014) over the index-th state after `seed`.
    """
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1
