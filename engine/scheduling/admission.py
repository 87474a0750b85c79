"""Admission: takes requests while there is room; each becomes a Sequence or fails."""

import itertools
import time
from collections.abc import Iterator

from engine.errors import RequestError
from engine.execution.matchers import Matchers
from engine.request import Completion, Request
from engine.sampling_params import MAX_BIASED_TOKENS, SamplingParams
from engine.scheduling.kv_cache import KVCache
from engine.scheduling.sequence import Sequence
from model import ModelConfig


def take_requests(source: Iterator[Request | None], room: int) -> tuple[list[Request], bool]:
    """Up to `room` requests that are available now, and whether the source may have more."""
    taken: list[Request] = []
    for request in itertools.islice(source, max(room, 0)):
        if request is None:
            return taken, True
        taken.append(request)
    return taken, len(taken) == max(room, 0)


def admit(
    request: Request,
    model: ModelConfig,
    max_positions: int,
    cache: KVCache,
    matchers: Matchers | None = None,
) -> Sequence | Completion:
    """The request as a sequence that can be queued, or its completion if it cannot run.

    max_positions: what the engine allows, which a small KV cache can reduce below the model's.
    matchers: of grammars; None: the engine has no tokenizer for them.
    """
    now, params = time.perf_counter(), request.params
    limit = min(max_positions, params.max_positions or max_positions)
    error = _check(request, limit, model)
    if params.grammar is not None and matchers is None:
        error = RequestError("a {grammar} needs a tokenizer: set Engine.tokenizer_json")
    if error is not None:
        return Completion(
            request.request_id,
            [],
            "error",
            error,
            prompt_tokens=len(request.prompt_ids),
            arrived=now,
            first_token=now,
            finished=now,
        )
    if params.max_new_tokens is not None:
        limit = min(limit, len(request.prompt_ids) + params.max_new_tokens)
    eos_ids = frozenset[int]() if params.ignore_eos else model.stop_ids
    sequence = Sequence(
        request,
        list(request.prompt_ids),
        limit,
        eos_ids | params.stop_ids,
        cache.new_tables(),
        now,
        logprobs=None if params.logprobs is None else [],
        rope_context=model.rope.recompute_length,
    )
    if params.grammar is not None and matchers is not None:
        sequence.matcher = matchers.start(params.grammar, sequence.stop_ids)
    return sequence


def _check(request: Request, limit: int, model: ModelConfig) -> RequestError | None:
    """Why the request cannot run within `limit` positions; None if it can."""
    ids, vocab = request.prompt_ids, model.vocab_size
    if not len(ids):
        return RequestError("the prompt is empty")
    if len(ids) + (request.params.max_new_tokens != 0) > limit:
        reason = "the model's limit"
        if limit == request.params.max_positions:
            reason = "set by {max_positions}; the model's limit is {model_limit}"
        elif limit < model.max_positions:
            reason = "all that the KV cache holds; the model's limit is {model_limit}"
        return RequestError(
            "the prompt has {length} tokens, which leaves no room for output within the limit of "
            "{limit} tokens (" + reason + ")",
            length=len(ids),
            limit=limit,
            model_limit=model.max_positions,
        )
    if min(ids) < 0 or max(ids) >= vocab:
        return RequestError(
            "the prompt has token ids outside the vocabulary of {vocab} tokens", vocab=vocab
        )
    return _check_tokens(request.params, model)


def _check_tokens(params: SamplingParams, model: ModelConfig) -> RequestError | None:
    """Why a request's changes of logits cannot be applied; None if they can."""
    if not params.adjusts_logits:
        return None
    words = (token for word in params.bad_words for token in word)
    named = (("logit_bias", (token for token, _ in params.bias)), ("bad_words", words))
    for name, tokens in named:
        other = next((token for token in tokens if not 0 <= token < model.vocab_size), None)
        if other is not None:
            return RequestError(
                f"{{{name}}} has the token id {{token}}, but the vocabulary has {{vocab}} tokens",
                token=other,
                vocab=model.vocab_size,
            )
    if params.min_new_tokens and len(params.stop_ids | model.stop_ids) > MAX_BIASED_TOKENS:
        return RequestError(
            "{min_new_tokens} allows at most {allowed} tokens in {stop_ids}",
            allowed=MAX_BIASED_TOKENS,
        )
    return None
