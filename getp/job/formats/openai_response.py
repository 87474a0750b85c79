"""Response bodies of OpenAI's /v1/chat/completions and /v1/completions."""

from collections.abc import Mapping
from typing import Any

from engine import Completion, TokenLogprobs
from getp.job.formats.interface import ResultContext
from tokenizer import Tokenizer
from tokenizer.harmony import FINAL

_MIN_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON does not have


def response_body(
    context: ResultContext, key: str, chat: bool, texts: Mapping[str, str], completion: Completion
) -> dict[str, Any]:
    """Return the body of a response; `texts` are the answer's, by channel.

    It does not depend on the rest of the batch, so a resumed job writes the same bytes.
    """
    prompt, output = completion.prompt_tokens, len(completion.token_ids)
    choice: dict[str, Any] = {"index": 0}
    if chat:
        message = {"role": "assistant", "content": texts.get(FINAL, ""), "refusal": None}
        thinking = "".join(text for name, text in texts.items() if name != FINAL)
        if thinking:
            message["reasoning_content"] = thinking
        choice["message"] = message
    else:
        choice["text"] = "".join(texts.values())
    choice["logprobs"] = (_chat_logprobs if chat else _text_logprobs)(completion, context.tokenizer)
    choice["finish_reason"] = completion.finish_reason
    return {
        "id": f"chatcmpl-{key}" if chat else f"cmpl-{key}",
        "object": "chat.completion" if chat else "text_completion",
        "created": context.created,
        "model": context.model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        },
    }


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token_id], skip_special=False)
    # A part of a character decodes to U+FFFD, from which its bytes cannot be derived.
    own_bytes = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": own_bytes}


def _pairs(completion: Completion) -> list[tuple[int, TokenLogprobs]]:
    return list(zip(completion.token_ids, completion.logprobs or (), strict=False))


def _chat_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    content = [
        {
            **_token(tokenizer, token_id, at.logprob),
            "top_logprobs": [_token(tokenizer, other, value) for other, value in at.top],
        }
        for token_id, at in _pairs(completion)
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    tokens = [_token(tokenizer, token_id, at.logprob) for token_id, at in _pairs(completion)]
    offsets, offset = [], 0
    for token in tokens:
        offsets.append(offset)
        offset += len(token["token"])
    tops = [
        {
            token["token"]: token["logprob"]
            for token in (_token(tokenizer, *pair) for pair in at.top)
        }
        for _, at in _pairs(completion)
    ]
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
