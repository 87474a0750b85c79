"""Logits → next tokens. Random numbers depend on seed and position alone, not on the batch."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from copy import copy

import torch

from engine.execution.adjustments import LogitAdjustments
from engine.execution.transfer import HostCopy, to_device
from engine.request import TokenLogprobs
from engine.sampling_params import SamplingParams
from model.ops.backend import Backend
from model.ops.sampling import NO_TOKEN
from model.ops.specs import SamplingTables
from model.sharding import ALONE, Shard

_LOWEST_TEMPERATURE = 2.0**-126  # float32 has lower numbers, but GPUs may take them for 0
_HIGHEST_TEMPERATURE = 2.0**127
_MAX_INT64 = 2**63 - 1


class Sampled:
    """The results of a step: sampled tokens, and scores of prompts; copied asynchronously."""

    def __init__(
        self,
        tokens: torch.Tensor,
        logprobs: tuple[torch.Tensor, ...] = (),
        logprob_counts: Mapping[int, int] | None = None,
    ):
        """tokens int64 [rows]; NO_TOKEN for a row whose logits are not finite.

        logprob_counts: row → how many most likely tokens to return with log-probabilities;
        logprobs: for these rows the sampled token's [rows], then values and ids [rows, tokens].
        """
        self._logprob_counts = logprob_counts or {}
        self._results = HostCopy(tokens, *logprobs)
        self._scores: HostCopy | None = None

    def add_scores(self, scores: tuple[torch.Tensor, ...]) -> None:
        """Add the log-probabilities of tokens of prompts, in the form of those of sampled ones."""
        self._scores = HostCopy(*scores)

    def read(self) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """Wait for the step; returns each row's token, and log-probabilities by row if requested.

        The token is NO_TOKEN if the row's logits are not finite.
        """
        tokens, *logprobs = self._results.read()
        if not self._logprob_counts:
            return tokens, {}
        sampled, values, ids = logprobs
        return tokens, {
            row: TokenLogprobs(
                sampled[i], tuple(zip(ids[i][:count], values[i][:count], strict=True))
            )
            for i, (row, count) in enumerate(self._logprob_counts.items())
        }

    def read_scores(self) -> list[TokenLogprobs]:
        """Wait for the step; returns the log-probabilities of all scored rows."""
        if self._scores is None:
            return []
        found, values, ids = self._scores.read()
        return [
            TokenLogprobs(own, tuple(zip(i, v, strict=True)))
            for own, v, i in zip(found, values, ids, strict=True)
        ]


class Sampler:
    """The last token and the sampling parameters of each running sequence, by row, on the device.

    With several ranks, each finds the most likely token in its part of the vocabulary. Only rank 0
    knows the parameters; if they matter, it gathers the logits of all ranks and samples alone.
    """

    def __init__(self, rows: int, backend: Backend, shard: Shard = ALONE, vocab: int = 0):
        """vocab: the size of the whole vocabulary."""
        device = backend.device
        self._shard, self.vocab = shard, vocab
        self.last = torch.zeros(rows, dtype=torch.int64, device=device)  # token sampled last
        self._backend, self._device = backend, device
        self._tables = SamplingTables(
            torch.tensor([0.0, 1.0], device=device).repeat(rows, 1),
            torch.zeros(rows, 2, dtype=torch.int64, device=device),
        )
        self._random: set[int] = set()  # rows whose temperature in the tables is not 0
        self.adjustments = LogitAdjustments(rows, vocab, device)

    def on(self, backend: Backend) -> "Sampler":
        """This sampler with its state, computing with another backend."""
        other = copy(self)
        other._backend = backend
        return other

    def set_params(self, rows: SequenceOf[int], params: SequenceOf[SamplingParams]) -> None:
        """Set the parameters of sequences that start in these rows."""
        changed = {
            row: p
            for row, p in zip(rows, params, strict=True)
            if p.temperature > 0 or row in self._random
        }
        if not changed:  # greedy sequences in rows that have been greedy
            return
        self._random -= changed.keys()
        self._random |= {row for row, p in changed.items() if p.temperature > 0}
        at = to_device(torch.tensor(list(changed)), self._device)
        # Python's integers have no largest value. The dtype is given, as 1 may be written for 1.0.
        floats = torch.tensor(
            [(_temperature(p), p.top_p) for p in changed.values()], dtype=torch.float32
        )
        ints = torch.tensor(
            [(min(p.top_k, _MAX_INT64), (p.seed or 0) & _MAX_INT64) for p in changed.values()]
        )
        self._tables.temperature_and_top_p.index_copy_(0, at, to_device(floats, self._device))
        self._tables.top_k_and_seed.index_copy_(0, at, to_device(ints, self._device))

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
        if all_greedy:
            return Sampled(self.sample_greedy(logits, rows))
        counts = {i: p.logprobs for i, p in non_greedy.items() if p.logprobs is not None}
        adjusts = any(params.adjusts_logits for params in non_greedy.values())
        if not counts:
            sample = self.sample_adjusted if adjusts else self.sample_rows
            return Sampled(sample(logits, rows, positions))
        logits = self._shard.gather_logits(logits, self.vocab)
        at = to_device(torch.tensor(list(counts)), self._device)
        original = logits[at]  # a copy
        tokens = self._sample_gathered(logits, rows, positions, adjusts)
        total = original.logsumexp(-1, keepdim=True)
        sampled = (original.gather(1, self.last[rows[at]].unsqueeze(1)) - total).squeeze(1)
        # Ordered as `argmax` orders them: the greedy token is the first.
        values, ids = self._backend.top_tokens(original, max(counts.values()))
        return Sampled(tokens, (sampled, values - total, ids), counts)

    def score(
        self, logits: torch.Tensor, targets: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, ...]:
        """The log-probabilities of tokens, and of the most likely ones: float32 [n], [n, count].

        logits float32 [n, this rank's part of the vocabulary]; targets int64 [n], known only to
        rank 0. The third result has the ids of the most likely tokens, int64 [n, count]. On other
        ranks there is no result.
        """
        logits = self._shard.gather_logits(logits, self.vocab)
        if self._shard.rank:
            return ()
        total = logits.logsumexp(-1, keepdim=True)
        own = (logits.gather(1, targets.unsqueeze(1)) - total).squeeze(1)
        if count == 1:
            values, ids = (each.unsqueeze(1) for each in self._backend.argmax(logits))
        else:
            values, ids = self._backend.top_tokens(logits, count)
        return own, values - total, ids

    def sample_greedy(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """As `sample_rows` in a step in which every sequence is greedy."""
        if self._shard.size == 1:
            return self._backend.sample_rows(logits, rows, self.last)
        highest, tokens = self._shard.argmax(*self._backend.argmax(logits), self.vocab)
        self.last.index_copy_(0, rows, tokens)
        return torch.where(highest.isfinite(), tokens, NO_TOKEN)

    def sample_rows(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Sample each sequence's next token by its row's parameters; it becomes the row's last one.

        logits and rows as in `sample`; positions int32 or int64 [n]. Returns the tokens int64 [n],
        NO_TOKEN where the logits are not finite; on ranks other than 0, the rows' last tokens.
        Every argument is on the device, and no kernel, size or argument depends on the parameters:
        on a GPU this can be captured once for each n and replayed with other rows and parameters.
        """
        logits = self._shard.gather_logits(logits, self.vocab)
        return self._sample_gathered(logits, rows, positions)

    def sample_adjusted(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """As `sample_rows` in a step in which a row changes its logits, in place."""
        logits = self._shard.gather_logits(logits, self.vocab)
        return self._sample_gathered(logits, rows, positions, adjusts=True)

    def _sample_gathered(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        adjusts: bool = False,
    ) -> torch.Tensor:
        """As `sample_rows`, from logits [n, vocab], which only rank 0 has; adjusts: change them."""
        shard = self._shard
        if shard.rank == 0:
            if adjusts:
                tables = self.adjustments.tables
                logits = self._backend.adjust_logits(logits, rows, self.last, positions, tables)
            tokens = self._backend.sample_rows(logits, rows, self.last, positions, self._tables)
        if shard.size == 1:
            return tokens
        last = shard.broadcast(self.last[rows])
        self.last.index_copy_(0, rows, last)
        return tokens if shard.rank == 0 else last


def _temperature(params: SamplingParams) -> float:
    """The temperature in the range that all devices can divide by, or 0."""
    if params.temperature == 0:
        return 0.0
    return max(min(params.temperature, _HIGHEST_TEMPERATURE), _LOWEST_TEMPERATURE)
