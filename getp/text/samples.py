"""Several answers to one prompt: their seeds, and the choice of the most likely ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine import Completion, SamplingParams, TokenLogprobs
from getp.text.prompts import request_seed


@dataclass(frozen=True)
class Samples:
    """The answers to a prompt: those that are returned, and the tokens of all that were generated.

    `completion_tokens` counts them as OpenAI does, also those of answers that are not returned.
    """

    chosen: Sequence[Completion]
    completion_tokens: int
    prompt_logprobs: Sequence[TokenLogprobs] = ()  # of the prompt from its second token on


def sample_params(params: SamplingParams, index: int, n: int, best_of: int) -> SamplingParams:
    """Return the parameters of a prompt's answer `index`, from 0 to best_of - 1.

    Each has its own seed, derived from that of the first. Choosing among them needs the
    log-probabilities of their tokens.
    """
    if best_of == 1:
        return params
    seed = params.seed if index == 0 else request_seed(params.seed, index)
    logprobs = 0 if params.logprobs is None and best_of > n else params.logprobs
    scored = params.prompt_logprobs if index == 0 else None  # the prompt is the same
    return replace(params, seed=seed, logprobs=logprobs, prompt_logprobs=scored)


def choose_samples(completions: Sequence[Completion], n: int, with_logprobs: bool) -> Samples:
    """Return the n answers with the highest log-probability per token, the most likely first.

    As many as there are keep their order. with_logprobs: return log-probabilities.
    """
    chosen = list(completions)
    if n < len(chosen):
        chosen.sort(key=_mean_logprob, reverse=True)  # stable
        chosen = chosen[:n]
    if not with_logprobs:
        chosen = [replace(each, logprobs=None) if each.logprobs else each for each in chosen]
    scores = next((each.prompt_logprobs for each in completions if each.prompt_logprobs), [])
    return Samples(chosen, sum(len(each.token_ids) for each in completions), scores)


def _mean_logprob(completion: Completion) -> float:
    values = [entry.logprob for entry in completion.logprobs or ()]
    # The last digits depend on the batch; equal answers must stay in their order.
    return round(sum(values) / max(len(values), 1), 4)
