"""Top-k and top-p sampling on a CPU: from the most likely tokens, else by a search or a sort."""

import torch

from model.ops.sampling import (
    effective_top_k,
    find_in_cumulative,
    keyed_uniform,
    sample_candidates,
    sample_vocabulary,
)
from model.ops.specs import SamplingTables

_CANDIDATES = 256  # of the most likely tokens, which nearly always contain all that top-p keeps
_SEARCH_LOGITS = 1 << 16  # logits that are searched together: their results stay in the caches
_DIGITS = 1 << 16  # values of a digit of 16 bits
_BLOCK = 1 << 8  # values of a digit that are summed as one block; there are as many blocks

Rows = torch.Tensor | slice  # indices of rows


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """As `Backend.sample`."""
    temperature, top_k = temperature.unsqueeze(1), effective_top_k(logits, top_k)
    values, ids = top_tokens(logits, _CANDIDATES)
    highest = values[:, :1]
    total = ((logits - highest) / temperature).logsumexp(-1, keepdim=True)
    values = (values - highest) / temperature
    tokens = sample_candidates(values, ids, total, top_k, top_p, uniform)
    if values.shape[1] == logits.shape[1]:
        return tokens
    # Each row's method depends on that row alone, so that its token does not depend on the others.
    rest = (top_k > values.shape[1]).nonzero().flatten()
    candidate_probs = (values[rest] - total[rest]).exp().sum(-1)
    # Top-p is a fraction of the probability that top-k keeps, so that with a top-k its tokens must
    # be candidates, too.
    limited = top_k[rest] < logits.shape[1]
    unlimited, rest = rest[(candidate_probs < top_p[rest]) & ~limited], rest[limited]
    for rows in unlimited.split(max(1, _SEARCH_LOGITS // logits.shape[1])):
        scaled = (logits[rows] - highest[rows]) / temperature[rows]
        probs = (scaled - total[rows]).exp().double()
        tokens[rows] = _search(logits[rows], probs, top_p[rows], uniform[rows])
    if len(rest):
        values, ids = logits[rest].sort(descending=True, stable=True)
        values = (values - highest[rest]) / temperature[rest]
        tokens[rest] = sample_candidates(
            values, ids, total[rest], top_k[rest], top_p[rest], uniform[rest]
        )
    return tokens


def sample_by_kind(
    logits: torch.Tensor,
    highest: torch.Tensor,
    tokens: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    tables: SamplingTables,
) -> torch.Tensor:
    """As `Backend.sample_rows`: the tokens int64 [n], where greedy rows keep those of `tokens`.

    highest [n]: the largest logit of each row, and `tokens` its token.
    """
    temperature, top_p = tables.temperature_and_top_p[rows].unbind(1)
    top_k, seeds = tables.top_k_and_seed[rows].unbind(1)
    uniform = keyed_uniform(seeds, positions.long())
    is_random, is_truncated = temperature > 0, (top_k > 0) | (top_p < 1)

    def truncated(at: Rows) -> torch.Tensor:
        # Without a top-k, no row needs a full sort.
        limit = top_k[at] if top_k.any() else None
        return sample(logits[at], temperature[at], limit, top_p[at], uniform[at])

    def whole(at: Rows) -> torch.Tensor:
        return sample_vocabulary(logits[at], highest[at], temperature[at], uniform[at])

    for kind, method in ((is_random & is_truncated, truncated), (is_random & ~is_truncated, whole)):
        at = kind.nonzero().flatten()
        if len(at) == len(tokens):
            return method(slice(None))
        if len(at):
            tokens[at] = method(at)
    return tokens


def top_tokens(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Backend.top_tokens`: by `topk`, which orders equal logits anyhow, then their order."""
    count = min(count, logits.shape[1])
    values, ids = logits.topk(min(count + 1, logits.shape[1]), dim=-1)
    is_tied = values[:, 1:] == values[:, :-1]
    if is_tied.any():
        ids, order = ids.sort(dim=-1)
        values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, order)
        # Where the last one has equals that were left out, they may have lower ids.
        rows = is_tied[:, count - 1 :].any(1).nonzero().flatten()
        all_values, all_ids = logits[rows].sort(dim=-1, descending=True, stable=True)
        values[rows], ids[rows] = (each[:, : ids.shape[1]] for each in (all_values, all_ids))
    return values[:, :count], ids[:, :count]


def _search(
    logits: torch.Tensor, probs: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """As `Backend.sample` without top-k, from probs float64 [rows, vocab] of all tokens.

    Two searches in the order of probability: for the end of top-p, and for the sampled token. Each
    sums the probabilities by the upper digit of the logits' keys, then within one value of that by
    the lower digit. Sorting a whole vocabulary takes several times as long.
    """
    digits = _key_digits(logits)
    sums = _sum_by_digit(digits[0], probs)
    # Not the sum of a row in one call: torch would split it among threads, in another order.
    target = top_p.double().unsqueeze(1) * sums.sum(-1).cumsum(-1)[:, -1:]
    _, before, prob, rest = _find_tokens(digits, probs, sums, target.nextafter(target * 0))
    kept = before + prob * (rest / prob).ceil().clamp(min=1)
    found, _, prob, rest = _find_tokens(digits, probs, sums, uniform.unsqueeze(1) * kept)
    count = found.sum(-1)
    index = (rest / prob).long().squeeze(1).minimum(count - 1)
    return found.nonzero()[count.cumsum(0) - count + index, 1]


def _key_digits(logits: torch.Tensor) -> list[torch.Tensor]:
    """Return sort keys that rise as logits fall, as digits of 16 bits, the upper one first.

    Each is int64 [rows, vocab].
    """
    bits = (logits.float() + 0.0).view(torch.int32)  # -0 becomes 0
    keys = torch.where(bits < 0, bits, bits ^ 0x7FFFFFFF)
    return [(keys >> 16 & 0xFFFF).long(), (keys & 0xFFFF).long()]


def _sum_by_digit(digit: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Sum the probabilities of each value of a digit: [rows, blocks, values of a block]."""
    sums = probs.new_zeros(len(probs), _DIGITS)
    return sums.scatter_add_(1, digit, probs).unflatten(1, (-1, _BLOCK))


def _find_tokens(
    digits: list[torch.Tensor], probs: torch.Tensor, sums: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the tokens, all of one logit, at which the cumulative probability passes the target.

    sums: `_sum_by_digit` of the upper digit; target [rows, 1]. Returns the tokens as a mask
    [rows, vocab], and [rows, 1] each: the cumulative probability before them, the probability of
    each of them, and the part of the target that is left for them.
    """
    found, rest = torch.ones_like(probs, dtype=torch.bool), target
    for i, digit in enumerate(digits):
        if i:
            sums = _sum_by_digit(digit, probs.masked_fill(~found, 0.0))
        block, rest = find_in_cumulative(sums.sum(-1), rest)
        block_sums = sums.gather(1, block.unsqueeze(2).expand(-1, 1, _BLOCK)).squeeze(1)
        value, rest = find_in_cumulative(block_sums, rest)
        found &= digit == block * _BLOCK + value
    prob = block_sums.gather(1, value) / found.sum(-1, keepdim=True)
    return found, target - rest, prob, rest
