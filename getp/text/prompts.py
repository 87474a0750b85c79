"""Encodes prompts and conversations, and derives the seed of each request."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from getp.errors import GetpError
from tokenizer import ChatTemplate, Message, Tokenizer

_MASK = 2**64 - 1
_MIN_CHECKED_LENGTH = 1 << 20  # characters; shorter texts are encoded without a check


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the tokenizer's chat template, which is compiled at the first use.

    Raises GetpError if there is none, and TemplateError if it is not valid.
    """
    if tokenizer.template is None:
        raise GetpError(
            "this model has no chat template (no {file}, none in tokenizer_config.json): give a "
            "tokenizer directory that has one with {tokenizer}, or use raw prompts ({raw}; not in "
            "a chat)",
            file="chat_template.jinja",
        )
    tokenizer.template.check()
    return tokenizer.template


def template_messages(template: ChatTemplate, messages: Sequence[Message]) -> list[Message]:
    """Return messages as this template needs them: what it would write as "None" becomes text."""
    return [_template_message(template, message) for message in messages]


def _template_message(template: ChatTemplate, message: Message) -> Message:
    found = dict(message)
    if found.get("content") is None and not template.distinguishes_none:
        found["content"] = ""
    if template.writes_arguments_as_text and "tool_calls" in found:
        found["tool_calls"] = [_with_text_arguments(call) for call in found["tool_calls"]]
    return found


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the prompt for the next answer of a conversation. Raises GetpError, TokenizerError."""
    # The template writes the first special token.
    return tokenizer.encode(render_chat(tokenizer, messages), special=False)


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
) -> str:
    """Return the text of `encode_chat`; variables: more variables of the template.

    Raises GetpError, TokenizerError.
    """
    template = chat_template(tokenizer)
    return template.render(template_messages(template, messages), variables)


def check_length(tokenizer: Tokenizer, text: str, limit: int) -> None:
    """Raise GetpError for a long text that must have more than `limit` tokens.

    Encoding megabytes of text takes minutes and gigabytes of memory, so this avoids it.
    """
    if len(text) <= max(_MIN_CHECKED_LENGTH, limit):
        return
    size = len(text.encode("utf-8", "replace"))
    if size > limit * tokenizer.max_token_bytes:
        raise GetpError(
            "the prompt has {bytes} bytes, which are more than {tokens} tokens, and leaves no room "
            "for output within the limit of {limit} tokens ({max_positions}, or the model's limit)",
            bytes=size,
            tokens=size // tokenizer.max_token_bytes,
            limit=limit,
        )


def encode_prompt(tokenizer: Tokenizer, text: str, chat: bool, system: str | None) -> list[int]:
    """Return a prompt's ids: of `text` as it is, or of a chat with `text` as its only message."""
    if not chat:
        return tokenizer.encode(text)
    return encode_chat(tokenizer, [*system_message(system), {"role": "user", "content": text}])


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of words that must not be written, at the start of a line and after others.

    Raises TokenizerError.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, f" {word.lstrip()}"):
            found[tuple(tokenizer.encode(text, special=False))] = None
    found.pop((), None)
    return tuple(found)


def system_message(system: str | None) -> list[Message]:
    """Return the first messages of a conversation: the system prompt, if there is one."""
    return [{"role": "system", "content": system}] if system else []


def request_seed(seed: int | None, index: int) -> int | None:
    """Return the seed of request `index` in a job with `seed`, from 0 to 2⁶³ - 1; None for None.

    Equal prompts of a job are thus sampled differently, but reproducibly. The seed is SplitMix64's
    output function (Steele, Lea, Flood 2014) of the index-th state after `seed`.
    """
    if seed is None:
        return None
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1
