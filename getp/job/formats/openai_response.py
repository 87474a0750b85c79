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
    """Return the body of a response; `texts` maps each channel to the answer's text in it.

    It does not depend on the rest of the batch, so a resumed job writes the same bytes.
    """
    prompt, output = completion.prompt_tokens, len(completion.token_ids)
    choice: dict[str, Any] = {"index": 0}
    if chat:
        message = {"role": "assistant", "content": texts.get(FINAL, ""), "refusal": None}
        reasoning = "".join(text for name, text in texts.items() if name != FINAL)
        if reasoning:
            message["reasoning_content"] = reasoning
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


def _token_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token_id], skip_special=False)
    # A partial character decodes to U+FFFD, so its bytes are not known.
    token_bytes = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": token_bytes}


def _logprobs(completion: Completion) -> list[tuple[int, TokenLogprobs]]:
    return list(zip(completion.token_ids, completion.logprobs or (), strict=False))


def _chat_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
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


def _text_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    tokens = [
        _token_entry(tokenizer, token_id, entry.logprob)
        for token_id, entry in _logprobs(completion)
    ]
    offsets, offset = [], 0
    for token in tokens:
        offsets.append(offset)
        offset += len(token["token"])
    tops = [
        {
            token["token"]: token["logprob"]
            for token in (_token_entry(tokenizer, *pair) for pair in entry.top)
        }
        for _, entry in _logprobs(completion)
    ]
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
