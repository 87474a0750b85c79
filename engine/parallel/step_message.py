"""A step as integers: all that a rank needs to compute it, and what other ranks are sent."""

import itertools
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from engine.scheduler import Step


@dataclass(frozen=True)
class StepMessage:
    """What `Step` says of its sequences, by their rows: those that decode first, then chunks."""

    decodes: int  # sequences whose token is the one that their row sampled last
    rows: SequenceOf[int]  # of every sequence
    ends: SequenceOf[int]  # positions up to which each sequence gets
    starts: SequenceOf[int]  # of each chunk
    samples: SequenceOf[int]  # of each chunk: 1 if its sequence's next token is wanted
    tokens: SequenceOf[int]  # of all chunks, one after the other
    tables: SequenceOf[tuple[int, SequenceOf[array]]]  # rows with new block tables, one a group
    drawn: bool  # some want more than the likeliest token

    @classmethod
    def of(cls, step: Step, drawn: bool) -> "StepMessage":
        """The step's."""
        chunks = step.chunks
        known = (chunk.sequence.tokens[chunk.start : chunk.end] for chunk in chunks)
        rows = [sequence.row for sequence in step.decodes]
        return cls(
            len(rows),
            rows + [chunk.sequence.row for chunk in chunks],
            step.ends,
            [chunk.start for chunk in chunks],
            [chunk.samples for chunk in chunks],
            list(itertools.chain.from_iterable(known)),
            [(sequence.row, sequence.tables.tables) for sequence in step.grown],
            drawn,
        )

    @property
    def size(self) -> int:
        """Sequences."""
        return len(self.rows)

    def packed(self) -> array:
        """As int32."""
        lengths = [self.decodes, self.size, len(self.tokens), len(self.tables), self.drawn]
        packed = array("i", lengths)
        for values in (self.rows, self.ends, self.starts, self.samples, self.tokens):
            packed.extend(values)
        for row, tables in self.tables:
            packed.append(row)
            for table in tables:
                packed.append(len(table))
                packed.extend(table)
        return packed

    @classmethod
    def unpacked(cls, packed: array, groups: int) -> "StepMessage":
        """From `packed`; groups: block tables of a sequence."""
        decodes, size, count, grown, drawn = packed[:5]
        at = 5
        lists = []
        for length in (size, size, size - decodes, size - decodes, count):
            lists.append(packed[at : at + length].tolist())
            at += length
        rows, ends, starts, samples, tokens = lists
        changed = []
        for _ in range(grown):
            row, at = packed[at], at + 1
            tables = []
            for _ in range(groups):
                length = packed[at]
                tables.append(packed[at + 1 : at + 1 + length])
                at += 1 + length
            changed.append((row, tables))
        return cls(decodes, rows, ends, starts, samples, tokens, changed, bool(drawn))
