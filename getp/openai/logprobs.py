"""Log-probabilities in the forms of OpenAI's chat and text completions, and those of prompts."""

from collections.abc import Sequence
from typing import Any

from engine import Completion, TokenLogprobs
from tokenizer import StreamDecoder, Tokenizer

_MIN_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON does not have


def chat_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return the log-probabilities of a message, None if they were not asked for."""
    if completion.logprobs is None:
        return None
    content = [
        {
            **_token_entry(tokenizer, token_id, entry.logprob),
            "top_logprobs": [_token_entry(tokenizer, other, value) for other, value in entry.top],
        }
        for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=False)
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    completion: Completion,
    tokenizer: Tokenizer,
    length: int,
    prompt_ids: Sequence[int] = (),
    prompt_logprobs: Sequence[TokenLogprobs] = (),
) -> dict[str, Any] | None:
    """Return the log-probabilities of a text of `length` characters; special tokens add no text.

    prompt_ids: of the prompt, if the text begins with it; prompt_logprobs: from its second token
    on, as the first one has none.
    """
    if completion.logprobs is None:
        return None
    token_ids = [*prompt_ids, *completion.token_ids]
    first: list[TokenLogprobs | None] = [None] if prompt_ids else []
    entries = [*first, *prompt_logprobs, *completion.logprobs]
    tokens, logprobs, offsets = list[str](), list[float | None](), list[int]()
    tops: list[dict[str, float] | None] = []
    decoder, offset = StreamDecoder(tokenizer), 0
    for token_id, entry in zip(token_ids, entries, strict=False):
        token = _token_entry(tokenizer, token_id, 0.0 if entry is None else entry.logprob)
        tokens.append(token["token"])
        logprobs.append(None if entry is None else token["logprob"])
        # Several tokens may have the same text, such as parts of characters. The sampled one is
        # always in the map, and of the others with the same text the most likely.
        top = {token["token"]: token["logprob"]}
        for other in (_token_entry(tokenizer, *pair) for pair in (entry.top if entry else ())):
            top.setdefault(other["token"], other["logprob"])
        tops.append(None if entry is None else top)
        # A token that continues a character begins where the character does.
        offsets.append(min(offset, length))
        offset += len(decoder.push(token_id))
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def prompt_logprobs(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], entries: Sequence[TokenLogprobs]
) -> list[dict[str, Any] | None]:
    """Return vLLM's `prompt_logprobs`: for each token a map from ids, null for the first token.

    entries: of the tokens from the second one on.
    """
    found: list[dict[str, Any] | None] = [None]
    for token_id, entry in zip(prompt_ids[1:], entries, strict=True):
        ranks = {other: rank for rank, (other, _) in enumerate(entry.top, start=1)}
        values = {token_id: entry.logprob, **dict(entry.top)}
        found.append(
            {
                str(other): {
                    "logprob": max(value, _MIN_LOGPROB),
                    "rank": ranks.get(other),
                    "decoded_token": tokenizer.decode([other], skip_special=False),
                }
                for other, value in values.items()
            }
        )
    return found


def _token_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token_id], skip_special=False)
    # A partial character decodes to U+FFFD, so its bytes are not known.
    token_bytes = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": token_bytes}
