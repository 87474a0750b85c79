"""Response bodies of OpenAI's /v1/chat/completions and /v1/completions."""

from collections.abc import Sequence
from typing import Any, Protocol

from engine import Completion, TokenLogprobs
from getp.openai.tools import calls_of
from getp.text.answer_text import Answer
from getp.text.samples import Samples
from tokenizer import StreamDecoder, Tokenizer

_MIN_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON does not have


class ResponseContext(Protocol):
    """What responses have in common."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, for the texts of log-probabilities."""

    @property
    def model(self) -> str:
        """Return the model's name."""

    @property
    def created(self) -> int:
        """Return the time of creation, in seconds since 1970."""


def response_body(
    context: ResponseContext, key: str, chat: bool, answers: Sequence[Answer], samples: Samples
) -> dict[str, Any]:
    """Return the body of a response; answers: the texts of the samples, in their order.

    It does not depend on the rest of the batch, so a resumed job writes the same bytes.
    """
    prompt, output = samples.chosen[0].prompt_tokens, samples.completion_tokens
    return {
        "id": f"chatcmpl-{key}" if chat else f"cmpl-{key}",
        "object": "chat.completion" if chat else "text_completion",
        "created": context.created,
        "model": context.model,
        "choices": [
            _choice(context.tokenizer, key if index == 0 else f"{key}_{index}", chat, *parts)
            | {"index": index}
            for index, parts in enumerate(zip(answers, samples.chosen, strict=True))
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        },
    }


def _choice(
    tokenizer: Tokenizer, key: str, chat: bool, answer: Answer, completion: Completion
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0}
    reason: str = completion.finish_reason
    if chat:
        choice["message"] = _message(answer, key)
        if answer.tool_calls and reason == "stop":
            reason = "tool_calls"
        choice["logprobs"] = chat_logprobs(completion, tokenizer)
    else:
        choice["text"] = answer.content
        choice["logprobs"] = text_logprobs(completion, tokenizer, len(answer.content))
    choice["finish_reason"] = reason
    return choice


def _message(answer: Answer, key: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        message["content"] = answer.content or None
        message["tool_calls"] = calls_of(answer.tool_calls, key)
    return message


def _token_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token_id], skip_special=False)
    # A partial character decodes to U+FFFD, so its bytes are not known.
    token_bytes = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": token_bytes}


def _logprobs(completion: Completion) -> list[tuple[int, TokenLogprobs]]:
    return list(zip(completion.token_ids, completion.logprobs or (), strict=False))


def chat_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return the log-probabilities of a message, None if they were not asked for."""
    if completion.logprobs is None:
        return None
    content = [
        {
            **_token_entry(tokenizer, token_id, entry.logprob),
            "top_logprobs": [_token_entry(tokenizer, other, value) for other, value in entry.top],
        }
        for token_id, entry in _logprobs(completion)
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    completion: Completion, tokenizer: Tokenizer, length: int
) -> dict[str, Any] | None:
    """Return the log-probabilities of a text of `length` characters; special tokens add no text."""
    if completion.logprobs is None:
        return None
    tokens, tops, offsets = [], [], []
    decoder, offset = StreamDecoder(tokenizer), 0
    for token_id, entry in _logprobs(completion):
        token = _token_entry(tokenizer, token_id, entry.logprob)
        tokens.append(token)
        # Several tokens may have the same text, such as parts of characters. The sampled one is
        # always in the map, and of the others with the same text the most likely.
        top = {token["token"]: token["logprob"]}
        for other in (_token_entry(tokenizer, *pair) for pair in entry.top):
            top.setdefault(other["token"], other["logprob"])
        tops.append(top)
        # A token that continues a character begins where the character does.
        offsets.append(min(offset, length))
        offset += len(decoder.push(token_id))
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
