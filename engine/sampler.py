"""Logits → next tokens. Randomness is keyed, so a result does not depend on the batch."""

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from functools import partial

import torch

from engine.request import SamplingParams, TokenLogprobs
from model.ops.backend import Backend
from model.ops.sampling import find_in_cumulative, reduce_blocks, take_block
from model.sharding import ALONE, Shard

NO_TOKEN = -1  # read for a row whose logits are not finite
_BLOCK = 1024  # tokens of the vocabulary that are looked at together


def put(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device, without waiting for either."""
    return pin(values, device).to(device, non_blocking=True)


def pin(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host where the device can copy it from while the host goes on."""
    return values if device.type == "cpu" else values.pin_memory()


class Sampled:
    """Tokens that a step samples, on their way to the host."""

    def __init__(
        self,
        tokens: torch.Tensor,
        highest: torch.Tensor,
        likeliest: tuple[torch.Tensor, ...] = (),
        wanted: Mapping[int, int] | None = None,
    ):
        """tokens int64 [rows]; highest [rows]: the largest logit of each, NaN if one is NaN.

        likeliest: for the wanted rows, log-probabilities as in `read`.
        """
        self._wanted = wanted or {}
        self._tensors = (tokens, highest, *likeliest)
        self._event: torch.cuda.Event | None = None
        if tokens.device.type == "cuda":
            copies = [torch.empty_like(t, device="cpu", pin_memory=True) for t in self._tensors]
            for copy, tensor in zip(copies, self._tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            self._tensors = tuple(copies)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """Wait for the step; each row's token, and log-probabilities by row where asked for.

        NO_TOKEN for a row whose logits are not finite: only here, as the next step reads on the
        device a token that exists.
        """
        if self._event is not None:
            self._event.synchronize()
        tokens, highest = self._tensors[0].tolist(), self._tensors[1].tolist()
        if not math.isfinite(sum(highest)):
            finite = map(math.isfinite, highest)
            tokens = [t if ok else NO_TOKEN for t, ok in zip(tokens, finite, strict=True)]
        if not self._wanted:
            return tokens, {}
        chosen, values, ids = (tensor.tolist() for tensor in self._tensors[2:])
        return tokens, {
            row: TokenLogprobs(
                chosen[i], tuple(zip(ids[i][:count], values[i][:count], strict=True))
            )
            for i, (row, count) in enumerate(self._wanted.items())
        }


class Sampler:
    """Each running sequence's last token and parameters, by its row, on the device.

    Of several ranks, all look for the likeliest token in their part of the vocabulary; rank 0
    alone knows parameters, and where they count it draws from everyone's logits.
    """

    def __init__(self, rows: int, backend: Backend, shard: Shard = ALONE, vocab: int = 0):
        device = backend.device
        self._shard, self._vocab = shard, vocab  # vocab: tokens that the ranks share out
        self.last = torch.zeros(rows, dtype=torch.int64, device=device)  # token sampled last
        self._ops, self._device = backend, device
        self._heat_and_top_p = torch.ones(rows, 2, device=device)
        self._top_k_and_seed = torch.zeros(rows, 2, dtype=torch.int64, device=device)

    def enter(self, rows: SequenceOf[int], params: SequenceOf[SamplingParams]) -> None:
        """Sequences whose tokens are drawn take these rows."""
        at = put(torch.tensor(rows), self._device)
        floats = torch.tensor([(p.temperature, p.top_p) for p in params])
        ints = torch.tensor([(p.top_k, p.seed & (2**63 - 1)) for p in params])
        self._heat_and_top_p.index_copy_(0, at, put(floats, self._device))
        self._top_k_and_seed.index_copy_(0, at, put(ints, self._device))

    def sample(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        special: Mapping[int, SamplingParams],
        drawn: bool,
    ) -> Sampled:
        """The next token of each sequence; it becomes the last of its row, on every rank.

        logits [n, this rank's part of the vocabulary]; rows int64 [n]: the sequences' own;
        positions [n]: the index that the new token will have in its sequence, which together with
        the request's seed decides the draw, and is not read without one; special: by index below
        n, those who want more than the likeliest token; drawn: whether there are such.
        """
        shard = self._shard
        if not drawn:
            highest, tokens = shard.argmax(*self._ops.argmax(logits), self._vocab)
            self.last.index_copy_(0, rows, tokens)
            return Sampled(tokens, highest)
        logits = shard.vocab_columns(logits, self._vocab)
        if shard.rank == 0:
            highest, tokens = self._choose(logits, rows, positions, special)
        else:
            highest = tokens = torch.empty_like(rows)
        self.last.index_copy_(0, rows, shard.broadcast(tokens))
        wanted = {i: p.logprobs for i, p in special.items() if p.logprobs is not None}
        if not wanted:
            return Sampled(tokens, highest)
        at = put(torch.tensor(list(wanted)), self._device)
        logprobs = logits[at].float().log_softmax(-1)
        chosen = logprobs.gather(1, tokens[at].unsqueeze(1)).squeeze(1)
        values, ids = logprobs.topk(min(max(wanted.values()), logprobs.shape[1]))
        return Sampled(tokens, highest, (chosen, values, ids), wanted)

    def _choose(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        special: Mapping[int, SamplingParams],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(Largest logit, next token) of each sequence, from logits [n, vocab]."""
        highest, tokens = self._ops.argmax(logits)
        drawn = {i: params for i, params in special.items() if params.temperature > 0}
        cut = {i: p for i, p in drawn.items() if p.top_k or p.top_p < 1}
        by_count = any(params.top_k for params in cut.values())
        for indices, draw in (
            (list(cut), partial(self._draw_cut, by_count=by_count)),
            ([i for i in drawn if i not in cut], self._draw_any),
        ):
            if indices and len(indices) == len(logits):
                tokens = draw(logits, rows, positions)
            elif indices:
                at = put(torch.tensor(indices), self._device)
                tokens.index_copy_(0, at, draw(logits[at], rows[at], positions[at]))
        return highest, tokens

    def _draw_any(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Draw from all of the vocabulary, in its own order; arguments as in `sample`.

        A row of NaN gives some token that exists: its shares are taken for ones.
        """
        heat = self._heat_and_top_p[rows, :1]
        shares = (logits.float() / heat).softmax(-1)
        uniform = keyed_uniform(self._top_k_and_seed[rows, 1:], positions.long().unsqueeze(1))
        blocks = reduce_blocks(shares, torch.sum, _BLOCK).double().nan_to_num_(1.0)
        block, at = find_in_cumulative(blocks, uniform * blocks.sum(-1, keepdim=True))
        place, _ = find_in_cumulative(
            take_block(shares, block, 0.0, _BLOCK).double().nan_to_num_(1.0), at
        )
        return (block * _BLOCK + place).squeeze(1)

    def _draw_cut(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, by_count: bool
    ) -> torch.Tensor:
        """Draw from what top-k and top-p leave; by_count: top-k is asked for in some row."""
        heat, top_p = self._heat_and_top_p[rows].unbind(1)
        top_k, seeds = self._top_k_and_seed[rows].unbind(1)
        uniform = keyed_uniform(seeds, positions.long())
        return self._ops.sample(logits, heat, top_k if by_count else None, top_p, uniform)


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
