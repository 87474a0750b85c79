"""The choice of tokens in plain torch: adjusted logits, top-k, top-p, the inverse cumulative.

Random numbers depend on seed and position alone, not on the batch.
"""

from collections.abc import Callable

import torch

from model.ops.adjustments import adjust_logits
from model.ops.specs import AdjustmentTables, SamplingTables

NO_TOKEN = -1  # in place of a token, for a row whose logits are not finite
_BLOCK = 1024  # tokens of the vocabulary that are reduced together


class SamplingOps:
    """The part of `Backend` that chooses the next tokens."""

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [rows, vocab] → (largest logit, its token) [rows]; of equal ones the first."""
        return logits.max(-1)

    def top_tokens(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest logits of each row, equal ones by id: (values, ids int64) [rows, count].

        logits [rows, vocab]; fewer than `count` if the vocabulary is smaller.
        """
        return top_tokens(logits, count)

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor | None,
        top_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """Sample a token for each row from its softmax after truncation by top-k, then top-p.

        logits [rows, vocab]; for each row temperature float32, above 0; top_k int64, how many
        tokens may be sampled, 0 for all (None: all in every row); top_p float32, the share of the
        probability that top-k leaves which the most likely tokens must reach; uniform float64 in
        [0, 1) → int64 [rows].

        Tokens are ordered by probability, equal ones by id, both for the limits and for the inverse
        of the cumulative distribution at `uniform`. The limits need this order anyway, and a sample
        among the most likely tokens then does not depend on the number of others. A row of NaN
        yields a valid token.
        """
        return sample_sorted(logits, temperature, top_k, top_p, uniform)

    def adjust_logits(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        last: torch.Tensor,
        positions: torch.Tensor,
        tables: AdjustmentTables,
    ) -> torch.Tensor:
        """Change the logits by what the rows' requests ask for, in place, and return them.

        The arguments are those of `sample_rows`, which follows. First the biases that apply at the
        row's position, then the mask, whose tokens without a bit become -inf, then the repetition,
        frequency and presence penalties, then min-p, whose tokens become -inf, too. The row's last
        token is counted before, unless it was counted when the row was set. Nothing here waits for
        the device or depends on its values, so that a GPU can capture it.
        """
        return adjust_logits(logits, rows, last, positions, tables)

    def sample_rows(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        last: torch.Tensor,
        positions: torch.Tensor | None = None,
        tables: SamplingTables | None = None,
    ) -> torch.Tensor:
        """Choose each sequence's next token and write it to `last`, by the sequence's row.

        logits float32 [n, vocab]; rows int64 [n], the sequences' rows; last int64 [all rows];
        positions int32 or int64 [n], the index of the new token in its sequence. A row's token is
        the most likely one at temperature 0 or without tables, from `sample` if top-k or top-p
        leaves tokens out, and else from `sample_vocabulary`, with the number of `keyed_uniform`.

        Returns the tokens int64 [n], NO_TOKEN where the row's largest logit is not finite; such a
        row has a valid token in `last`. Nothing here waits for the device or depends on its values,
        so that a GPU can capture it.
        """
        highest, tokens = self.argmax(logits)
        if tables is not None and positions is not None:
            temperature, top_p = tables.temperature_and_top_p[rows].unbind(1)
            top_k, seeds = tables.top_k_and_seed[rows].unbind(1)
            is_greedy = temperature == 0
            temperature = torch.where(is_greedy, 1.0, temperature)
            uniform = keyed_uniform(seeds, positions.long())
            sampled = torch.where(
                (top_k > 0) | (top_p < 1),
                self.sample(logits, temperature, top_k, top_p, uniform),
                sample_vocabulary(logits, highest, temperature, uniform),
            )
            tokens = torch.where(is_greedy, tokens, sampled)
        last.index_copy_(0, rows, tokens)
        return torch.where(highest.isfinite(), tokens, NO_TOKEN)


def keyed_uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Uniform float64 numbers in [0, 1) from (seed, position), both int64 [rows].

    SplitMix64's finalizer (Steele, Lea & Flood 2014) over the seed's hash plus the position.
    """
    bits = _mix(_mix(seeds) + positions * -7046029254386353131)
    return (bits >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685
    return x ^ (x >> 31 & (1 << 33) - 1)


def sample_vocabulary(
    logits: torch.Tensor, highest: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """Sample from the whole vocabulary, in the order of its ids → int64 [rows].

    logits [rows, vocab]; highest: the largest logit of each row; uniform float64 in [0, 1). A row
    of NaN yields a valid token: NaN probabilities count as ones.
    """
    # Of the difference to the largest, so that a tiny temperature does not overflow.
    probs = ((logits - highest.unsqueeze(1)) / temperature.unsqueeze(1)).softmax(-1)
    blocks = reduce_blocks(probs, torch.sum, _BLOCK).double().nan_to_num_(1.0)
    target = uniform.unsqueeze(1) * blocks.sum(-1, keepdim=True)
    block, rest = find_in_cumulative(blocks, target)
    within = take_block(probs, block, 0.0, _BLOCK).double().nan_to_num_(1.0)
    offset, _ = find_in_cumulative(within, rest)
    return (block * _BLOCK + offset).squeeze(1)


def sample_sorted(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Sample as `Backend.sample` describes it, by sorting every row in full."""
    values, ids = logits.sort(descending=True, stable=True)
    values = (values - values[:, :1]) / temperature.unsqueeze(1)
    total = values.logsumexp(-1, keepdim=True)
    return sample_candidates(values, ids, total, effective_top_k(logits, top_k), top_p, uniform)


def top_tokens(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Backend.top_tokens`, by a key that is different for every token of a row."""
    vocab = logits.shape[1]
    bits = (logits.float() + 0.0).view(torch.int32)  # -0 becomes 0
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (rising << 32) + torch.arange(vocab - 1, -1, -1, device=logits.device)
    ids = vocab - 1 - (keys.topk(min(count, vocab), dim=-1).values & 0xFFFFFFFF)
    return logits.gather(1, ids), ids


def effective_top_k(logits: torch.Tensor, top_k: torch.Tensor | None) -> torch.Tensor:
    """Return top_k int64 [rows], with the vocabulary's size where it is 0 or None (no limit)."""
    rows, vocab = logits.shape
    if top_k is None:
        return torch.full((rows,), vocab, device=logits.device)
    return torch.where(top_k == 0, vocab, top_k)


def sample_candidates(
    values: torch.Tensor,
    ids: torch.Tensor,
    total: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Sample from the most likely candidates of each row.

    values [rows, candidates] descending: logits less the row's largest, which keeps a tiny
    temperature from overflowing, divided by the temperature; ids int64 of the same shape;
    total [rows, 1]: logsumexp of the values of all tokens; top_k from `effective_top_k`. If the
    candidates are not all tokens, they must number at least top-k or, where that is no limit, hold
    at least the probability top-p.
    """
    probs = (values - total).exp().double()
    rank = torch.arange(values.shape[1], device=values.device)
    top_k = top_k.unsqueeze(1)
    probs = probs.masked_fill(rank >= top_k, 0.0)
    whole = torch.where(top_k <= values.shape[1], probs.sum(-1, keepdim=True), 1.0)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill((before >= top_p.unsqueeze(1) * whole) & (rank > 0), 0.0)
    cumulative = probs.cumsum(-1)
    chosen = (cumulative <= uniform.unsqueeze(1) * cumulative[:, -1:]).sum(-1, keepdim=True)
    # Rounding may lead past the last token kept, and a row of NaN keeps none.
    last = ((probs > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    return ids.gather(1, torch.minimum(chosen, last)).squeeze(1)


def find_in_cumulative(
    probs: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find where the cumulative sum of probs float64 [rows, n] passes `target` [rows, 1].

    Returns (index, remainder), both [rows, 1]: the index, whose probability is never 0, and the
    part of `target` that is left there.
    """
    cumulative = probs.cumsum(-1)
    target = target.clamp(min=0).minimum(cumulative[:, -1:].nextafter(target.new_zeros(())))
    index = torch.searchsorted(cumulative, target, right=True)
    return index, target - (cumulative - probs).gather(1, index)


def reduce_blocks(
    values: torch.Tensor, reduce: Callable[..., torch.Tensor], size: int
) -> torch.Tensor:
    """Reduce each block of `size` columns of values [rows, n] → [rows, blocks]; the last block may
    be short.
    """
    whole = values.shape[1] // size * size
    found = []
    if whole:
        found.append(reduce(values[:, :whole].unflatten(1, (-1, size)), -1))
    if whole < values.shape[1]:
        found.append(reduce(values[:, whole:], -1, keepdim=True))
    return torch.cat(found, dim=1)


def take_block(
    values: torch.Tensor, block: torch.Tensor, padding: float, size: int
) -> torch.Tensor:
    """Take from values [rows, n] each row's block [rows, 1] → [rows, size]; `padding` beyond n."""
    places = block * size + torch.arange(size, device=values.device)
    count = values.shape[1]
    return values.gather(1, places.clamp(max=count - 1)).masked_fill(places >= count, padding)
