"""HistoryRunner: a fake runner that detects wrong KV blocks, for tests of the scheduler.

It stores a hash of the token history in every KV slot and checks it at every read. It thereby
detects blocks that are shared by mistake, freed too early or read before they are written.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.scheduling.kv_cache import NULL_BLOCK, LayerGroup
from engine.scheduling.sequence import Step
from model.ops.backend import Backend

VOCAB = 5  # few tokens, so that equal prefixes are frequent


def history(tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(bytes(tokens), digest_size=12).digest()


def next_token(tokens: Sequence[int]) -> int:
    return history(tokens)[0] % VOCAB


class Sampled(list[int]):
    """Tokens of a launched step."""

    def read_scores(self) -> list[Any]:
        return []

    def read(self) -> tuple[list[int], dict[int, Any]]:
        return list(self), {}


class HistoryRunner:
    """A runner whose KV slots hold token histories, which are checked whenever they are read.

    Like the real runner it receives block tables only through `changed_tables`, and decodes from
    its sampled tokens, which the sequence may not contain yet.
    """

    captured = True

    def __init__(self, groups: list[LayerGroup], block_size: int):
        self.groups, self.block_size = groups, block_size
        self.states: dict[int, bytes] = {}  # the history that a recurrent layer's state is of
        self.backend = Backend(torch.device("cpu"), torch.float32)
        self.slots: dict[tuple[int, int], bytes] = {}
        self.tables: dict[int, list[list[int]]] = {}  # by row
        self.last: dict[int, int] = {}  # sampled last, by row
        self.steps = 0
        self.unread = 0  # decoded tokens that the sequence did not contain yet
        self.fail_at = -1
        self.max_tokens = 1 << 60  # a step with more runs out of memory
        self.has_states = False  # whether the model has recurrent layers

    def check(self, checkpoint: Path, adapters: object = ()) -> None: ...

    def load(self, checkpoint: Path, dummy: bool, adapters: object = ()) -> None: ...

    def block_bytes(self, block_size: int) -> int:
        return 1

    def state_bytes(self) -> int:
        return 1

    def record(self) -> None: ...

    def allocate(
        self,
        num_blocks: int,
        block_size: int,
        max_positions: int,
        max_batch_size: int,
        snapshots: int = 0,
    ) -> None:
        self.rows = range(max_batch_size)

    def free(self) -> None: ...

    def slot(self, row: int, group: int, at: int) -> tuple[int, int]:
        block = self.tables[row][group][at // self.block_size]
        assert block != NULL_BLOCK
        return block, at % self.block_size

    def launch(self, step: Step) -> Sampled:
        self.steps += 1
        for sequence in step.changed_tables:
            self.tables[sequence.row] = [list(table) for table in sequence.block_tables.tables]
        pieces: list[tuple[int, list[int], int, bool]] = []  # row, tokens, start, samples
        for sequence in step.corrected:
            self.last[sequence.row] = sequence.tokens[-1]
        for sequence in step.decodes:
            tokens = sequence.tokens[: sequence.computed]
            if len(tokens) < sequence.computed:
                tokens.append(self.last[sequence.row])
                self.unread += 1
            assert len(tokens) == sequence.computed
            assert tokens[-1] == self.last[sequence.row]
            pieces.append((sequence.row, tokens, sequence.computed - 1, True))
        for draft in step.drafts:
            sequence = draft.sequence
            assert sequence in step.decodes
            for i, row in enumerate(draft.rows):
                self.tables[row] = [list(table) for table in sequence.block_tables.tables]
                tokens = sequence.tokens + draft.tokens[: i + 1]
                assert len(tokens) < sequence.max_tokens
                pieces.append((row, tokens, len(tokens) - 1, True))
        for chunk in step.chunks:
            tokens = chunk.sequence.tokens[: chunk.end]
            assert len(tokens) == chunk.end
            pieces.append((chunk.sequence.row, tokens, chunk.start, chunk.samples))
        lengths = [len(tokens) - start for _, tokens, start, _ in pieces]
        assert lengths == sorted(lengths, key=lambda length: length > 1), "single tokens first"
        assert step.context_lens == [len(tokens) for _, tokens, _, _ in pieces]
        assert (step.size, step.tokens) == (len(pieces), sum(lengths))
        rows = {row for row, *_ in pieces}
        assert len(rows) == len(pieces)
        assert rows <= set(self.rows)
        for source, target in step.restored:
            self.states[target] = self.states[source]
        if self.has_states:
            for row, tokens, start, _ in pieces:
                if start:
                    assert self.states[row] == history(tokens[:start])
                self.states[row] = history(tokens)
        written: set[tuple[int, int]] = set()
        for row, tokens, start, _ in pieces:
            assert start < len(tokens)
            for g in range(len(self.groups)):
                for at in range(start, len(tokens)):
                    slot = self.slot(row, g, at)
                    assert slot not in written, "two tokens write one slot"
                    written.add(slot)
                    # All groups share the pool: a block belongs to one group at a time.
                    self.slots[slot] = bytes([g]) + history(tokens[: at + 1])
        if self.steps == self.fail_at or sum(lengths) > self.max_tokens:
            for slot in written:
                self.slots[slot] = b"half written"
            self.states = dict.fromkeys(self.states, b"half written")
            if self.steps == self.fail_at:
                raise RuntimeError("the device is gone")
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sampled = Sampled()
        for row, tokens, start, samples in pieces:
            for g, group in enumerate(self.groups):
                first = 0 if group.window is None else max(0, start - group.window + 1)
                for at in range(first, len(tokens)):
                    held = self.slots[self.slot(row, g, at)]
                    assert held == bytes([g]) + history(tokens[: at + 1])
            if samples:
                self.last[row] = next_token(tokens)
                sampled.append(self.last[row])
        assert len(sampled) == len(step.sampling())
        assert len({target for _, target in step.saved}) == len(step.saved)
        for source, target in step.saved:
            assert target not in self.rows
            self.states[target] = self.states[source]
        return sampled
