"""Logits → next tokens. Random numbers depend on seed and position alone, not on the batch."""

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from functools import partial

import torch

from engine.request import SamplingParams, TokenLogprobs
from model.ops.backend import Backend
from model.ops.sampling import find_in_cumulative, reduce_blocks, take_block
from model.sharding import ALONE, Shard

NO_TOKEN = -1  # in place of a token, for a row whose logits are not finite
_LOWEST_TEMPERATURE = 2.0**-126  # float32 has lower numbers, but GPUs may take them for 0
_HIGHEST_TEMPERATURE = 2.0**127
_MAX_INT64 = 2**63 - 1
_BLOCK = 1024  # tokens of the vocabulary that are reduced together


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device without blocking the host."""
    return pin(values, device).to(device, non_blocking=True)


def pin(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The host tensor in pinned memory, which the device can copy asynchronously."""
    return values if device.type == "cpu" else values.pin_memory()


class Sampled:
    """The sampled tokens of a step, which are copied to the host asynchronously."""

    def __init__(
        self,
        tokens: torch.Tensor,
        highest: torch.Tensor,
        logprobs: tuple[torch.Tensor, ...] = (),
        logprob_counts: Mapping[int, int] | None = None,
    ):
        """tokens int64 [rows]; highest [rows]: the largest logit of each, NaN if one is NaN.

        logprob_counts: row → how many most likely tokens to return with log-probabilities;
        logprobs: for these rows the sampled token's [rows], then values and ids [rows, tokens].
        """
        self._logprob_counts = logprob_counts or {}
        self._tensors = (tokens, highest, *logprobs)
        self._event: torch.cuda.Event | None = None
        if tokens.device.type == "cuda":
            copies = [torch.empty_like(t, device="cpu", pin_memory=True) for t in self._tensors]
            for copy, tensor in zip(copies, self._tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            self._tensors = tuple(copies)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """Wait for the step; returns each row's token, and log-probabilities by row if requested.

        The token is NO_TOKEN if the row's logits are not finite. On the device such a row has a
        valid token, because the next step reads it.
        """
        if self._event is not None:
            self._event.synchronize()
        tokens, highest = self._tensors[0].tolist(), self._tensors[1].tolist()
        if not math.isfinite(sum(highest)):
            finite = map(math.isfinite, highest)
            tokens = [t if ok else NO_TOKEN for t, ok in zip(tokens, finite, strict=True)]
        if not self._logprob_counts:
            return tokens, {}
        sampled, values, ids = (tensor.tolist() for tensor in self._tensors[2:])
        return tokens, {
            row: TokenLogprobs(
                sampled[i], tuple(zip(ids[i][:count], values[i][:count], strict=True))
            )
            for i, (row, count) in enumerate(self._logprob_counts.items())
        }


class Sampler:
    """The last token and the sampling parameters of each running sequence, by row, on the device.

    With several ranks, each finds the most likely token in its part of the vocabulary. Only rank 0
    knows the parameters; if they matter, it gathers the logits of all ranks and samples alone.
    """

    def __init__(self, rows: int, backend: Backend, shard: Shard = ALONE, vocab: int = 0):
        """vocab: the size of the whole vocabulary, needed with several ranks."""
        device = backend.device
        self._shard, self._vocab = shard, vocab
        self.last = torch.zeros(rows, dtype=torch.int64, device=device)  # token sampled last
        self._backend, self._device = backend, device
        self._temperature_and_top_p = torch.ones(rows, 2, device=device)
        self._top_k_and_seed = torch.zeros(rows, 2, dtype=torch.int64, device=device)

    def set_params(self, rows: SequenceOf[int], params: SequenceOf[SamplingParams]) -> None:
        """Set the parameters of sequences that start in these rows and are not greedy."""
        at = to_device(torch.tensor(rows), self._device)
        # Python's integers have no largest value. The dtype is given, as 1 may be written for 1.0.
        temperatures = [
            max(min(p.temperature, _HIGHEST_TEMPERATURE), _LOWEST_TEMPERATURE) for p in params
        ]
        floats = torch.tensor(
            [(t, p.top_p) for t, p in zip(temperatures, params, strict=True)], dtype=torch.float32
        )
        ints = torch.tensor(
            [(min(p.top_k, _MAX_INT64), (p.seed or 0) & _MAX_INT64) for p in params]
        )
        self._temperature_and_top_p.index_copy_(0, at, to_device(floats, self._device))
        self._top_k_and_seed.index_copy_(0, at, to_device(ints, self._device))

    def sample(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        non_greedy: Mapping[int, SamplingParams],
        all_greedy: bool,
    ) -> Sampled:
        """Sample the next token of each sequence; it becomes its row's last one, on every rank.

        logits float32 [n, this rank's part of the vocabulary]; rows int64 [n], the sequences' rows;
        positions [n], the index of the new token in its sequence, which seeds the random number
        together with the request's seed (not read if all are greedy); non_greedy: index below n →
        parameters, of the sequences that are not greedy; all_greedy: there are none, on any rank.
        """
        shard = self._shard
        if all_greedy:
            highest, tokens = shard.argmax(*self._backend.argmax(logits), self._vocab)
            self.last.index_copy_(0, rows, tokens)
            return Sampled(tokens, highest)
        logits = shard.gather_logits(logits, self._vocab)
        if shard.rank == 0:
            highest, tokens = self._sample(logits, rows, positions, non_greedy)
        else:
            highest = tokens = torch.empty_like(rows)
        self.last.index_copy_(0, rows, shard.broadcast(tokens))
        counts = {i: p.logprobs for i, p in non_greedy.items() if p.logprobs is not None}
        if not counts:
            return Sampled(tokens, highest)
        at = to_device(torch.tensor(list(counts)), self._device)
        logits = logits[at]
        total = logits.logsumexp(-1, keepdim=True)
        sampled = (logits.gather(1, tokens[at].unsqueeze(1)) - total).squeeze(1)
        # Ordered as `argmax` orders them: the greedy token is the first.
        values, ids = self._backend.top_tokens(logits, max(counts.values()))
        return Sampled(tokens, highest, (sampled, values - total, ids), counts)

    def _sample(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        non_greedy: Mapping[int, SamplingParams],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(Largest logit, next token) of each sequence, from logits [n, vocab]."""
        highest, tokens = self._backend.argmax(logits)
        random = {i: params for i, params in non_greedy.items() if params.temperature > 0}
        truncated = {i: p for i, p in random.items() if p.top_k or p.top_p < 1}
        with_top_k = any(params.top_k for params in truncated.values())
        whole = [i for i in random if i not in truncated]
        sample = partial(self._sample_truncated, with_top_k=with_top_k)
        tokens = self._replace(tokens, list(truncated), sample, logits, rows, positions)
        tokens = self._replace(
            tokens, whole, self._sample_vocabulary, logits, highest, rows, positions
        )
        return highest, tokens

    def _replace(
        self,
        tokens: torch.Tensor,
        indices: list[int],
        sample: Callable[..., torch.Tensor],
        *args: torch.Tensor,
    ) -> torch.Tensor:
        """The tokens [n], those of `indices` from `sample`, which gets these rows of `args`."""
        if not indices:
            return tokens
        if len(indices) == len(tokens):
            return sample(*args)
        at = to_device(torch.tensor(indices), self._device)
        return tokens.index_copy_(0, at, sample(*(each[at] for each in args)))

    def _sample_vocabulary(
        self,
        logits: torch.Tensor,
        highest: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Sample from the whole vocabulary, in the order of its ids; arguments as in `sample`.

        highest [n]: the largest logit of each. A row of NaN yields a valid token: NaN probabilities
        count as ones.
        """
        temperature = self._temperature_and_top_p[rows, :1]
        # Of the difference to the largest, so that a tiny temperature does not overflow.
        probs = ((logits - highest.unsqueeze(1)) / temperature).softmax(-1)
        uniform = keyed_uniform(self._top_k_and_seed[rows, 1:], positions.long().unsqueeze(1))
        blocks = reduce_blocks(probs, torch.sum, _BLOCK).double().nan_to_num_(1.0)
        block, rest = find_in_cumulative(blocks, uniform * blocks.sum(-1, keepdim=True))
        within = take_block(probs, block, 0.0, _BLOCK).double().nan_to_num_(1.0)
        offset, _ = find_in_cumulative(within, rest)
        return (block * _BLOCK + offset).squeeze(1)

    def _sample_truncated(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, with_top_k: bool
    ) -> torch.Tensor:
        """Sample from the tokens that top-k and top-p keep; with_top_k: some row has a top-k."""
        temperature, top_p = self._temperature_and_top_p[rows].unbind(1)
        top_k, seeds = self._top_k_and_seed[rows].unbind(1)
        uniform = keyed_uniform(seeds, positions.long())
        return self._backend.sample(
            logits, temperature, top_k if with_top_k else None, top_p, uniform
        )


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
