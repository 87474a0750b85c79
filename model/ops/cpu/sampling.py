"""Top-k, top-p and the draw on a CPU: from the likeliest few, else a search, rarely a sort."""

import torch

from model.ops.sampling import effective_top_k, find_in_cumulative, sample_candidates

# Nearly always these hold the whole nucleus.
_CANDIDATES = 256
_AT_ONCE = 1 << 16  # logits that are searched together: what a search makes stays in the caches
_KEYS = 1 << 16  # of 16 bits, in blocks of as many as there are blocks
_BLOCK = 1 << 8


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """As `Backend.sample`, but for the order of equal logits, which is that of `topk`."""
    column, top_k = temperature.unsqueeze(1), effective_top_k(logits, top_k)
    total = (logits.float() / column).logsumexp(-1, keepdim=True)
    values, ids = logits.topk(min(_CANDIDATES, logits.shape[1]), dim=-1)
    values = values.float() / column
    tokens = sample_candidates(values, ids, total, top_k, top_p, uniform)
    if values.shape[1] == logits.shape[1]:
        return tokens
    # A row is judged by itself alone, so that its path does not depend on the others either.
    rest = (top_k > values.shape[1]).nonzero().flatten()
    reached = (values[rest] - total[rest]).exp().sum(-1)
    # Top-p is a share of what top-k leaves, so that a count that is a limit has to be reached too.
    limited = top_k[rest] < logits.shape[1]
    large, rest = rest[(reached < top_p[rest]) & ~limited], rest[limited]
    for some in large.split(max(1, _AT_ONCE // logits.shape[1])):
        shares = (logits[some].float() / column[some] - total[some]).exp().double()
        tokens[some] = _search(logits[some], shares, top_p[some], uniform[some])
    if len(rest):
        values, ids = logits[rest].sort(descending=True, stable=True)
        values = values.float() / column[rest]
        tokens[rest] = sample_candidates(
            values, ids, total[rest], top_k[rest], top_p[rest], uniform[rest]
        )
    return tokens


def _search(
    logits: torch.Tensor, shares: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """As `Backend.sample` without top-k, from the shares float64 [rows, vocab] of all tokens.

    Two searches in the order of probability, for where top-p ends and for the token drawn: shares
    are added up by the upper half of their logits' keys, then within one of those by the lower.
    A sort of a whole vocabulary takes several times as long.
    """
    halves = _halves(logits)
    mass = _add_up(halves[0], shares)
    # One sum of a row alone torch would share out among threads, and so add in another order.
    wanted = top_p.double().unsqueeze(1) * mass.sum(-1).cumsum(-1)[:, -1:]
    _, before, share, left = _place(halves, shares, mass, wanted.nextafter(wanted * 0))
    kept = before + share * (left / share).ceil().clamp(min=1)
    same, _, share, left = _place(halves, shares, mass, uniform.unsqueeze(1) * kept)
    equal = same.sum(-1)
    which = (left / share).long().squeeze(1).minimum(equal - 1)
    return same.nonzero()[equal.cumsum(0) - equal + which, 1]


def _halves(logits: torch.Tensor) -> list[torch.Tensor]:
    """int64 [rows, vocab] each: 16 bits of keys that rise as logits fall, the upper half first.

    bfloat16 has only those.
    """
    bits = (logits.float() + 0.0).view(torch.int32)  # -0 is 0
    keys = torch.where(bits < 0, bits, bits ^ 0x7FFFFFFF)
    upper = (keys >> 16 & 0xFFFF).long()
    return [upper] if logits.dtype == torch.bfloat16 else [upper, (keys & 0xFFFF).long()]


def _add_up(keys: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The shares of each key: [rows, blocks, keys of a block]."""
    mass = shares.new_zeros(len(shares), _KEYS)
    return mass.scatter_add_(1, keys, shares).unflatten(1, (-1, _BLOCK))


def _place(
    halves: list[torch.Tensor], shares: torch.Tensor, mass: torch.Tensor, at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens of one logit at which the running sum passes `at` [rows, 1].

    mass: of the upper half → (which they are [rows, vocab], the sum before them, the share of
    each, what is left of `at` there); all but the first are [rows, 1].
    """
    same, left = torch.ones_like(shares, dtype=torch.bool), at
    for i, keys in enumerate(halves):
        if i:
            mass = _add_up(keys, shares.masked_fill(~same, 0.0))
        block, left = find_in_cumulative(mass.sum(-1), left)
        inside = mass.gather(1, block.unsqueeze(2).expand(-1, 1, _BLOCK)).squeeze(1)
        place, left = find_in_cumulative(inside, left)
        same &= keys == block * _BLOCK + place
    share = inside.gather(1, place) / same.sum(-1, keepdim=True)
    return same, at - left, share, left
