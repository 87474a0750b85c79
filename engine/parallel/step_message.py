"""StepMessage: a step as integers, which a runner computes and rank 0 sends to other ranks."""

import itertools
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from engine.scheduling.sequence import Step


@dataclass(frozen=True)
class StepMessage:
    """A `Step` in terms of rows: decoding sequences first, then chunks."""

    decodes: int  # rows that compute the token that they sampled last, or one that is given
    rows: SequenceOf[int]  # of every decode and chunk
    context_lens: SequenceOf[int]  # of every sequence: positions with KV after the step
    starts: SequenceOf[int]  # of every chunk: its first position
    lengths: SequenceOf[int]  # of every chunk: known tokens of its sequence
    samples: SequenceOf[int]  # of every chunk: 1 if its sequence's next token is sampled
    tokens: SequenceOf[int]  # of all chunks, concatenated
    block_tables: SequenceOf[tuple[int, SequenceOf[array]]]  # changed rows: a table for each group
    all_greedy: bool  # every sampled token is the most likely one, without log-probabilities
    given: SequenceOf[tuple[int, int]] = ()  # (row, token): replaces what the row sampled last
    restored: SequenceOf[tuple[int, int]] = ()  # as in Step
    saved: SequenceOf[tuple[int, int]] = ()
    # Of every chunk with scored tokens: the first of its rows that are scored, and their number.
    scored: SequenceOf[tuple[int, int]] = ()

    @classmethod
    def of(cls, step: Step, all_greedy: bool) -> "StepMessage":
        """The message of a step."""
        chunks = step.chunks
        known = (chunk.sequence.tokens[chunk.start : chunk.end] for chunk in chunks)
        rows = [sequence.row for sequence in step.decodes]
        tables = [(sequence.row, sequence.block_tables.tables) for sequence in step.changed_tables]
        given = [(sequence.row, sequence.tokens[-1]) for sequence in step.corrected]
        given += [(s.row, s.given_token) for s in step.forced if s.given_token is not None]
        for draft in step.drafts:
            rows += draft.rows
            tables += [(row, draft.sequence.block_tables.tables) for row in draft.rows]
            given += zip(draft.rows, draft.tokens, strict=True)
        scored = []
        first = len(rows)
        for chunk in chunks:
            if chunk.scored:
                scored.append((first + chunk.scored.start - 1 - chunk.start, len(chunk.scored)))
            first += chunk.end - chunk.start
        return cls(
            len(rows),
            rows + [chunk.sequence.row for chunk in chunks],
            step.context_lens,
            [chunk.start for chunk in chunks],
            [len(chunk.sequence.tokens) for chunk in chunks],
            [chunk.samples for chunk in chunks],
            list(itertools.chain.from_iterable(known)),
            tables,
            all_greedy,
            given,
            step.restored,
            step.saved,
            scored,
        )

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def packed(self) -> array:
        """All fields as int32, lengths first."""
        tables = self.block_tables
        pairs = self.given, self.restored, self.saved, self.scored
        counts = self.decodes, self.size, len(self.tokens), *map(len, pairs), len(tables)
        packed = array("i", [*counts, self.all_greedy])
        packed.extend(itertools.chain(self.rows, self.context_lens))
        packed.extend(itertools.chain(self.starts, self.lengths, self.samples, self.tokens))
        packed.extend(itertools.chain.from_iterable(itertools.chain(*pairs)))
        for row, row_tables in tables:
            packed.append(row)
            for table in row_tables:
                packed.append(len(table))
                packed.extend(table)
        return packed

    @classmethod
    def unpacked(cls, packed: array, groups: int) -> "StepMessage":
        """The message from `packed`; groups: block tables of each sequence."""
        decodes, size, count, *pairs, changed, all_greedy = packed[:9]
        at = 9
        lists = []
        for length in (size, size, *[size - decodes] * 3, count, *(2 * n for n in pairs)):
            lists.append(packed[at : at + length].tolist())
            at += length
        rows, context_lens, starts, lengths, samples, tokens, *flat = lists
        block_tables = []
        for _ in range(changed):
            row, at = packed[at], at + 1
            tables = []
            for _ in range(groups):
                length = packed[at]
                tables.append(packed[at + 1 : at + 1 + length])
                at += 1 + length
            block_tables.append((row, tables))
        return cls(
            decodes,
            rows,
            context_lens,
            starts,
            lengths,
            samples,
            tokens,
            block_tables,
            bool(all_greedy),
            *(list(zip(each[::2], each[1::2], strict=True)) for each in flat),
        )
