"""Response bodies of OpenAI's /v1/chat/completions and /v1/completions."""

from collections.abc import Sequence
from typing import Any, Protocol

from engine import Completion
from getp.openai.logprobs import chat_logprobs, prompt_logprobs, text_logprobs
from getp.openai.tools import calls_of
from getp.text.answer_text import Answer
from getp.text.samples import Samples
from tokenizer import Tokenizer


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
    body: dict[str, Any] = {
        "id": f"chatcmpl-{key}" if chat else f"cmpl-{key}",
        "object": "chat.completion" if chat else "text_completion",
        "created": context.created,
        "model": context.model,
        "choices": [
            _choice(
                context.tokenizer, key if index == 0 else f"{key}_{index}", chat, *parts, samples
            )
            | {"index": index}
            for index, parts in enumerate(zip(answers, samples.chosen, strict=True))
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        },
    }
    if chat and answers[0].scored_ids:
        ids = answers[0].scored_ids
        body["prompt_logprobs"] = prompt_logprobs(context.tokenizer, ids, samples.prompt_logprobs)
    return body


def _choice(
    tokenizer: Tokenizer,
    key: str,
    chat: bool,
    answer: Answer,
    completion: Completion,
    samples: Samples,
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0}
    reason: str = completion.finish_reason
    if chat:
        choice["message"] = _message(answer, key)
        if answer.tool_calls and reason == "stop":
            reason = "tool_calls"
        choice["logprobs"] = chat_logprobs(completion, tokenizer)
    else:
        echoed = answer.echoed_ids
        choice["text"] = text = answer.echoed + answer.content
        scores = samples.prompt_logprobs if echoed else ()
        choice["logprobs"] = text_logprobs(completion, tokenizer, len(text), echoed, scores)
        if answer.scored_ids:
            scores = samples.prompt_logprobs
            choice["prompt_logprobs"] = prompt_logprobs(tokenizer, answer.scored_ids, scores)
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
