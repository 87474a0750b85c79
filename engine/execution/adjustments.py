"""What requests change about their logits, by row, on the device: the one place before sampling.

A row is set when its sequence starts in it. From then on a step reads it, and counts the token that
the row sampled last, without the host: so steps can be captured, and be launched before the tokens
of earlier ones are known. `Backend.adjust_logits` applies the tables.
"""

import math
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property

import torch

from engine.execution.transfer import to_device
from engine.sampling_params import MAX_BIASED_TOKENS, SamplingParams
from engine.scheduling.sequence import Sequence, Step
from model.ops.adjustments import MAX_COUNT, NO_FACTORS
from model.ops.specs import AdjustmentTables

MAX_ENTRIES = 3 * MAX_BIASED_TOKENS  # biases, bad words, and stop ids of a minimum length
_ALWAYS, _ANY = 2**31 - 1, -1
_Entry = tuple[int, int, int, int, float]


@dataclass(frozen=True)
class RowStart:
    """A sequence that starts in a row; `drafted` are tokens after those that it has."""

    row: int
    sequence: Sequence
    drafted: SequenceOf[int] = ()

    @property
    def tokens(self) -> list[int]:
        """All tokens before the next one that the row samples."""
        return [*self.sequence.tokens, *self.drafted]

    @property
    def params(self) -> SamplingParams:
        """The sequence's parameters."""
        return self.sequence.request.params


def adjustment_bytes(vocab: int) -> int:
    """The memory of a row of the tables."""
    return 2 * vocab + 20 * MAX_ENTRIES + 32 + 4 * mask_words(vocab)


def mask_words(vocab: int) -> int:
    """The int32 of a mask of tokens."""
    return -(-vocab // 32)


def row_starts(step: Step) -> list[RowStart]:
    """The rows whose state a step sets: those of new sequences, and those of draft tokens."""
    starts = [RowStart(c.sequence.row, c.sequence) for c in step.chunks if c.samples]
    for draft in step.drafts:
        starts += [
            RowStart(row, draft.sequence, draft.tokens[: i + 1]) for i, row in enumerate(draft.rows)
        ]
    return starts


class LogitAdjustments:
    """The tables of all rows, in memory that is allocated when a request first needs it."""

    def __init__(self, rows: int, vocab: int, device: torch.device):
        self._rows, self._vocab, self._device = rows, vocab, device
        self._active: set[int] = set()  # rows that change logits

    @cached_property
    def tables(self) -> AdjustmentTables:
        """The tables; rows that no request has set change nothing."""
        rows, device = self._rows, self._device
        # A capture may be the first to need them, but rows are set outside its inference mode.
        with torch.inference_mode(False):
            return AdjustmentTables(
                torch.tensor(NO_FACTORS, device=device).repeat(rows, 1),
                torch.zeros(rows, 4, dtype=torch.int32, device=device),
                # Not zeros: a row is written when a sequence with penalties starts in it, and on a
                # CPU the memory of others is never touched.
                torch.empty(rows, self._vocab, dtype=torch.int16, device=device),
                torch.zeros(rows, MAX_ENTRIES, 4, dtype=torch.int32, device=device),
                torch.zeros(rows, MAX_ENTRIES, device=device),
                torch.empty(rows, mask_words(self._vocab), dtype=torch.int32, device=device),
            )

    def allocate(self) -> None:
        """Allocate the tables now."""
        _ = self.tables

    def update(self, step: Step, starts: SequenceOf[RowStart]) -> None:
        """Set the rows of a step before it is launched; starts: from `row_starts`."""
        changed = [s for s in starts if s.params.adjusts_logits or s.row in self._active]
        # After a draft the row has counted fewer tokens than were accepted.
        changed += [RowStart(s.row, s) for s in step.corrected if s.request.params.has_penalties]
        if changed:
            self._set_rows(changed)
        if self._active:
            self._update_long_words(step)

    def _update_long_words(self, step: Step) -> None:
        """Set the entries of bad words whose beginning must be compared with known tokens."""
        entries = []
        for sequence, position in zip(step.decodes, step.context_lens, strict=False):
            if any(len(word) > 2 for word in sequence.request.params.bad_words):
                known = sequence.tokens[: position - 1]
                entries.append((sequence.row, [*_entries(sequence, known, position, self._vocab)]))
        self._set_entries(entries)

    def _set_rows(self, starts: SequenceOf[RowStart]) -> None:
        rows = [start.row for start in starts]
        self._active.difference_update(rows)
        self._active.update(start.row for start in starts if start.params.adjusts_logits)
        entries = []
        counted = []
        for start in starts:
            tokens = start.tokens
            entries.append(
                (start.row, [*_entries(start.sequence, tokens[:-1], len(tokens), self._vocab)])
            )
            has_mask = start.params.grammar is not None
            counted.append((len(tokens), len(entries[-1][1]), start.params.has_penalties, has_mask))
        self._write(self.tables.factors, rows, [_factors(start.params) for start in starts])
        self._write(self.tables.starts, rows, counted)
        self._set_entries(entries)
        self._set_counts([start for start in starts if start.params.has_penalties])

    def set_masks(self, rows: list[int], masks: torch.Tensor) -> None:
        """Set which tokens rows may sample; masks: int32 [rows, words], on the host."""
        index = to_device(torch.tensor(rows, dtype=torch.int64), self._device)
        self.tables.masks.index_copy_(0, index, to_device(masks, self._device))

    def _set_counts(self, starts: SequenceOf[RowStart]) -> None:
        if not starts:
            return
        counts, at, values = self.tables.counts, list[int](), list[int]()
        for start in starts:
            prompt = len(start.sequence.request.prompt_ids)
            outputs = Counter(start.tokens[prompt:])
            found = {token: min(2 * count, MAX_COUNT - 1) for token, count in outputs.items()}
            for token in set(start.tokens[:prompt]):
                found[token] = found.get(token, 0) + 1
            at += [start.row * self._vocab + token for token in found]
            values += found.values()
        rows = to_device(torch.tensor([start.row for start in starts]), self._device)
        counts.index_fill_(0, rows, 0)
        counts.view(-1).index_copy_(
            0,
            to_device(torch.tensor(at), self._device),
            to_device(torch.tensor(values, dtype=torch.int16), self._device),
        )

    def _set_entries(self, entries: SequenceOf[tuple[int, SequenceOf[_Entry]]]) -> None:
        at = [row * MAX_ENTRIES + i for row, own in entries for i in range(len(own))]
        if not at:
            return
        every = [entry for _, own in entries for entry in own]
        self._write(self.tables.entries.view(-1, 4), at, [entry[:4] for entry in every])
        self._write(self.tables.biases.view(-1), at, [entry[4] for entry in every])

    def _write(self, table: torch.Tensor, at: list[int], values: SequenceOf[object]) -> None:
        rows = torch.tensor(values, dtype=table.dtype)
        index = to_device(torch.tensor(at), self._device)
        table.index_copy_(0, index, to_device(rows, self._device))


def _factors(params: SamplingParams) -> tuple[float, ...]:
    """A row of the factors; min-p keeps logits of at least the largest plus T · ln(min_p)."""
    penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
    distance = -math.inf
    if params.min_p and params.temperature:
        distance = params.temperature * math.log(params.min_p)
    return *penalties, distance


def _entries(
    sequence: Sequence, known: SequenceOf[int], position: int, vocab: int
) -> Iterator[_Entry]:
    """The biases of a row that samples the token at `position`, always the same number.

    known: all tokens before the last one, which only the device knows.
    """
    params, prompt = sequence.request.params, len(sequence.request.prompt_ids)
    for token, bias in params.bias:
        yield token, 0, _ALWAYS, _ANY, bias
    if params.min_new_tokens:
        for token in sorted(token for token in sequence.stop_ids if 0 <= token < vocab):
            yield token, 0, prompt + params.min_new_tokens, _ANY, -math.inf
    for word in params.bad_words:
        start, token = list(word[:-1]), word[-1]
        first, end = 0, _ALWAYS
        if len(start) == 1:
            first = prompt + 1  # the token before must be one of the output
        elif start:
            begins = known[prompt:][-len(start) + 1 :] == start[:-1]
            first, end = (position, position + 1) if begins else (0, 0)
        yield token, first, end, start[-1] if start else _ANY, -math.inf
