"""Encodes prompts and conversations, and derives the seed of each request."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from getp.errors import GetpError
from tokenizer import ChatTemplate, Message, Tokenizer

_EFFORT = "reasoning_effort"
_SWITCHES = ("enable_thinking", "thinking")  # Qwen, GLM and others; DeepSeek, Kimi, Granite
_SHORT_ID = 9  # characters of the only ids that Mistral's templates accept
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


def template_variables(template: ChatTemplate, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables for this template. Raises TemplateError.

    Where it has no `reasoning_effort`, the effort "none" sets its switch for thinking to false.
    """
    found = dict(given)
    if found.get(_EFFORT) == "none" and _EFFORT not in template.variables:
        switches = [name for name in _SWITCHES if name in template.variables]
        found |= dict.fromkeys(switches, False)
        if switches:
            del found[_EFFORT]
    return found


def _template_message(template: ChatTemplate, message: Message) -> Message:
    found = dict(message)
    if found.get("content") is None and not template.distinguishes_none:
        found["content"] = ""
    if template.reads_thinking:
        _move_reasoning(found)
    if template.writes_arguments_as_text and "tool_calls" in found:
        found["tool_calls"] = [_with_text_arguments(call) for call in found["tool_calls"]]
    if template.needs_short_ids:
        _shorten_ids(found)
    return found


def _move_reasoning(message: dict[str, Any]) -> None:
    """Give a message the key of gpt-oss's template, which refuses it beside content and calls."""
    reasoning = message.pop("reasoning_content", None)
    if reasoning and not (message.get("content") and message.get("tool_calls")):
        message.setdefault("thinking", reasoning)


def _shorten_ids(message: dict[str, Any]) -> None:
    """Give calls ids of the length that the template accepts, and their results the same."""
    if "tool_calls" in message:
        message["tool_calls"] = [
            {**call, "id": _short_id(call.get("id"))} for call in message["tool_calls"]
        ]
    if "tool_call_id" in message:
        message["tool_call_id"] = _short_id(message["tool_call_id"])


def _short_id(given: Any) -> str:
    text = str(given)
    if len(text) == _SHORT_ID and text.isalnum():
        return text
    return hashlib.blake2b(text.encode("utf-8", "replace")).hexdigest()[:_SHORT_ID]


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the prompt for the next answer of a conversation. Raises GetpError, TokenizerError."""
    # The template writes the first special token.
    return tokenizer.encode(render_chat(tokenizer, messages, variables), special=False)


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
) -> str:
    """Return the text of `encode_chat`; variables: more variables of the template.

    Raises GetpError, TokenizerError.
    """
    template = chat_template(tokenizer)
    found = template_variables(template, variables or {})
    return template.render(template_messages(template, messages), found)


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


def encode_prompt(
    tokenizer: Tokenizer,
    text: str,
    chat: bool,
    system: str | None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return a prompt's ids: of `text` as it is, or of a chat with `text` as its only message."""
    if not chat:
        return tokenizer.encode(text)
    messages = [*system_message(system), {"role": "user", "content": text}]
    return encode_chat(tokenizer, messages, variables)


def unused_variables(tokenizer: Tokenizer, given: Mapping[str, Any]) -> list[str]:
    """Return the variables that the chat template does not use. Raises GetpError, TemplateError."""
    template = chat_template(tokenizer)
    return sorted(set(template_variables(template, given)) - template.variables)


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
