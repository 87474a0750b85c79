"""Logits → next tokens. Randomness is keyed, so a result does not depend on the batch."""

from collections.abc import Sequence as SequenceOf

import torch

from engine.request import SamplingParams, TokenLogprobs
from model import ops

# Nearly always these hold the whole nucleus; a row whose nucleus is larger is sorted in full.
_CANDIDATES = 256


def sample(
    logits: torch.Tensor, params: SequenceOf[SamplingParams], positions: SequenceOf[int]
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """The next token of each row, and log-probabilities where they are asked for.

    logits [rows, vocab]; positions [rows]: the index that the new token will have in its
    sequence, which together with the request's seed decides the draw.
    """
    tokens = ops.argmax(logits)
    drawn = [row for row, p in enumerate(params) if p.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(
            logits[drawn], [params[r] for r in drawn], [positions[r] for r in drawn]
        )
    logprobs: list[TokenLogprobs | None] = [None] * len(params)
    for row, p in enumerate(params):
        if p.logprobs is not None:
            logprobs[row] = _logprobs(logits[row], int(tokens[row]), p.logprobs)
    return tokens.tolist(), logprobs


def _draw(
    logits: torch.Tensor, params: SequenceOf[SamplingParams], positions: SequenceOf[int]
) -> torch.Tensor:
    device, vocab = logits.device, logits.shape[1]
    heat = torch.tensor([p.temperature for p in params], device=device).unsqueeze(1)
    logits = logits.float() / heat
    uniform = keyed_uniform(
        torch.tensor([p.seed & (2**63 - 1) for p in params], device=device),
        torch.tensor(positions, device=device),
    ).unsqueeze(1)
    top_k = torch.tensor([p.top_k or vocab for p in params], device=device).unsqueeze(1)
    top_p = torch.tensor([p.top_p for p in params], device=device).unsqueeze(1)
    total = logits.logsumexp(-1, keepdim=True)
    values, ids = logits.topk(min(_CANDIDATES, vocab), dim=-1)
    enough = ((values - total).exp().sum(-1, keepdim=True) >= top_p) | (top_k <= values.shape[1])
    tokens = _pick(values, ids, total, top_k, top_p, uniform)
    # A row is judged by itself alone, so that its path does not depend on the others either.
    rest = (~enough).flatten().nonzero().flatten()
    if len(rest) and vocab > values.shape[1]:
        values, ids = logits[rest].sort(descending=True, stable=True)
        tokens[rest] = _pick(values, ids, total[rest], top_k[rest], top_p[rest], uniform[rest])
    return tokens


def _pick(
    values: torch.Tensor,
    ids: torch.Tensor,
    total: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Inverse of the cumulative distribution over tokens in order of probability.

    values, ids [rows, candidates] descending; the others [rows, 1] → token ids [rows].
    Top-k comes first and top-p is a share of what it leaves, as elsewhere.
    """
    shares = (values - total).exp().double()
    rank = torch.arange(values.shape[1], device=values.device)
    shares = shares.masked_fill(rank >= top_k, 0.0)
    whole = torch.where(top_k <= values.shape[1], shares.sum(-1, keepdim=True), 1.0)
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill((before >= top_p * whole) & (rank > 0), 0.0)
    upto = shares.cumsum(-1)
    chosen = (upto <= uniform * upto[:, -1:]).sum(-1, keepdim=True)
    last = (shares > 0).sum(-1, keepdim=True) - 1  # rounding may point behind the last kept one
    return ids.gather(1, torch.minimum(chosen, last)).squeeze(1)


def keyed_uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Uniform float64 in [0, 1) from (seed, position), both int64 [rows].

    SplitMix64's finaliser (Steele, Lea & Flood 2014) over the seed's hash plus the position.
    """
    bits = _mix(_mix(seeds) + positions * -7046029254386353131)
    return (bits >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685
    return x ^ (x >> 31 & (1 << 33) - 1)


def _logprobs(logits: torch.Tensor, token: int, top: int) -> TokenLogprobs:
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    return TokenLogprobs(
        float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
    )
