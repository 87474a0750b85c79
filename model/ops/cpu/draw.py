"""Top-k, top-p and the draw on a CPU: a full sort only of the rows that need one."""

import torch

from model.ops import reference

# Nearly always these hold the whole nucleus; a row whose nucleus is larger is sorted in full.
_CANDIDATES = 256


def draw(
    logits: torch.Tensor,
    heat: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """As `reference.draw`, but for the order of equal logits, which is that of `topk`."""
    column, top_k = heat.unsqueeze(1), reference.counts_kept(logits, top_k)
    total = (logits.float() / column).logsumexp(-1, keepdim=True)
    values, ids = logits.topk(min(_CANDIDATES, logits.shape[1]), dim=-1)
    values = values.float() / column
    tokens = reference.pick(values, ids, total, top_k, top_p, uniform)
    if values.shape[1] == logits.shape[1]:
        return tokens
    # A row is judged by itself alone, so that its path does not depend on the others either.
    rest = (top_k > values.shape[1]).nonzero().flatten()
    reached = (values[rest] - total[rest]).exp().sum(-1)
    # Top-p is a share of what top-k leaves, so that a count that is a limit has to be reached too.
    rest = rest[(reached < top_p[rest]) | (top_k[rest] < logits.shape[1])]
    if len(rest):
        values, ids = logits[rest].sort(descending=True, stable=True)
        values = values.float() / column[rest]
        tokens[rest] = reference.pick(
            values, ids, total[rest], top_k[rest], top_p[rest], uniform[rest]
        )
    return tokens
