"""The bookkeeping of the paged KV cache: blocks, reference counts and cached prefixes.

Layers that share an attention window form a group with its own block tables; all groups use one
pool, since every block has the same size in memory. Layers with fewer or smaller heads than others
have correspondingly more layers in a block. Block tables are indexed by absolute position: a group
with a sliding window frees the blocks behind it and keeps the null block in their place, so a
cached prefix is usable as long as the blocks within the window are still cached.

    positions      0 ........ 16 ....... 32 ....... 48 ....... 64
    full group     [ 3        | 4        | 9        | 12       ]
    window 16      [ 0 (null) | 0 (null) | 10       | 13       ]
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.scheduling.state_cache import StateCache

NULL_BLOCK = 0


class KvKind(NamedTuple):
    """What layers of a group have in common."""

    window: int | None
    width: int = 1  # bytes, or any other unit, of a position's keys


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share block tables; layer i of the group uses KV tensor i // parts.

    That is part i % parts of each block of the tensor.
    """

    window: int | None
    layers: tuple[int, ...]
    parts: int = 1

    @property
    def tensors(self) -> int:
        """The KV tensors that the group uses."""
        return -(-len(self.layers) // self.parts)


def group_layers(layers: SequenceOf[KvKind | None]) -> list[LayerGroup]:
    """Group layers by kind, into groups of one size so that blocks are interchangeable.

    The size is in KV tensors, of which layers that are half as wide as the widest need half. It is
    that of the smallest kind, so a kind that needs k times as many becomes k groups. A group may
    need fewer than others; a part of each of its blocks is then unused. None: a layer without keys
    and values of its own.
    """
    kinds: dict[KvKind, list[int]] = {}
    for layer, kind in enumerate(layers):
        if kind is not None:
            kinds.setdefault(kind, []).append(layer)
    widest = max(kind.width for kind in kinds)
    parts = {kind: widest // kind.width for kind in kinds}
    needed = [-(-len(own) // parts[kind]) for kind, own in kinds.items()]
    size = max(needed) if max(needed) <= 1.5 * min(needed) else min(needed)
    return [
        LayerGroup(kind.window, tuple(own[i : i + size * parts[kind]]), parts[kind])
        for kind, own in kinds.items()
        for i in range(0, len(own), size * parts[kind])
    ]


@dataclass
class BlockTables:
    """One sequence's blocks: a table for each group, and the digests of its full blocks."""

    tables: list[array]  # of int32
    capacity: int = 0  # positions that the allocated blocks can hold
    digests: list[bytes] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)  # by group: blocks freed behind its window
    indexed: int = 0  # full blocks that are in the prefix index
    salt: bytes = b""  # only tables with the same salt share prefixes
    # As `match_prefix` last found: positions whose blocks are cached, also those beyond the last
    # snapshot of a state, and whether the step that is being scheduled takes a better snapshot.
    shared: int = 0
    awaits_snapshot: bool = False

    def use_salt(self, salt: bytes) -> None:
        """Set the salt of empty tables; digests with another salt are dropped."""
        if salt != self.salt:
            self.salt, self.digests = salt, []


class KVCache:
    """Block pool with reference counts, a prefix index and least-recently-used eviction."""

    def __init__(
        self,
        groups: SequenceOf[LayerGroup],
        num_blocks: int,
        block_size: int,
        prefix_cache: bool = True,
        states: StateCache | None = None,
    ):
        """Create a pool of num_blocks blocks, the null block included.

        states: the snapshots that prefixes need in models with recurrent layers; None: there are no
        such layers.
        """
        self.groups, self.states = groups, states
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._entry: list[tuple[int, bytes] | None] = [None] * num_blocks  # its key in the index
        self._index: list[dict[bytes, int]] = [{} for _ in groups]
        # Blocks without references, in order of reuse: blocks outside the prefix index come first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that sequences use."""
        return self.num_blocks - 1 - len(self._free)

    def new_tables(self) -> BlockTables:
        """Empty tables for a sequence."""
        return BlockTables([array("i") for _ in self.groups], freed=[0] * len(self.groups))

    def capacity(self, max_chunk: int) -> int:
        """Positions that a sequence running alone can reach, in chunks of at most max_chunk."""
        usable = self.num_blocks - 1
        full = sum(group.window is None for group in self.groups)
        # A windowed group needs at most a chunk and the window before it, neither block-aligned.
        windowed = sum(
            -(-(group.window + max_chunk) // self.block_size) + 1
            for group in self.groups
            if group.window is not None
        )
        if not full and usable >= windowed:
            return 1 << 60
        blocks = usable // len(self.groups)  # if no block behind a window were freed
        if full:
            blocks = max(blocks, (usable - windowed) // full)
        return blocks * self.block_size

    def blocks_for(self, tables: BlockTables, end: int) -> int:
        """New blocks that the tables need to hold positions below `end`."""
        wanted = -(-end // self.block_size)
        return sum(max(0, wanted - len(table)) for table in tables.tables)

    def allocate(self, tables: BlockTables, start: int, end: int) -> bool:
        """Free blocks behind the windows, then extend the tables to hold [start, end).

        False, with no new blocks, if the pool has too few free ones.
        """
        self._free_behind_windows(tables, start)
        if self.blocks_for(tables, end) > len(self._free):
            return False
        wanted = -(-end // self.block_size)
        for table in tables.tables:
            while len(table) < wanted:
                table.append(self._take())
        tables.capacity = max(tables.capacity, wanted * self.block_size)
        return True

    def release(self, tables: BlockTables) -> None:
        """Free every block, the last first, so that prefixes stay cached longer than tails."""
        for table in tables.tables:
            for block in reversed(table):
                self._drop(block)
            del table[:]
        tables.capacity = 0
        tables.freed = [0] * len(self.groups)
        tables.indexed = 0  # digests remain valid: they depend only on salt and tokens

    def match_prefix(self, tables: BlockTables, tokens: SequenceOf[int]) -> int:
        """Fill empty tables with the longest cached prefix; returns its length in tokens.

        At least the last token remains to be computed. A group without a window needs every block
        of the prefix, a group with one only those that the next token attends to. With states the
        prefix must also have a snapshot.
        """
        if not self._prefix_cache:
            return 0
        longest = (len(tokens) - 1) // self.block_size
        states, best = self.states, 0
        tables.shared, tables.awaits_snapshot = 0, False
        runs = [0] * len(self.groups)  # consecutive cached blocks up to the current one
        for count in range(1, longest + 1):
            digest = self._digest(tables, tokens, count - 1)
            for g, group in enumerate(self.groups):
                if digest in self._index[g]:
                    runs[g] += 1
                elif group.window is None:
                    runs[g] = -1
                    break
                else:
                    runs[g] = 0
            if -1 in runs:
                break
            if all(
                run >= count - self._first_attended(group, count * self.block_size)
                for run, group in zip(runs, self.groups, strict=True)
            ):
                tables.shared = count * self.block_size
                if states is None or states.has(digest):
                    best, tables.awaits_snapshot = count, False
                else:
                    tables.awaits_snapshot |= states.is_pending(digest)
        for g, group in enumerate(self.groups):
            first = self._first_attended(group, best * self.block_size)
            table = tables.tables[g]
            table.extend([NULL_BLOCK] * first)
            tables.freed[g] = first
            for i in range(first, best):
                block = self._index[g][tables.digests[i]]
                if not self._references[block]:
                    del self._free[block]
                self._references[block] += 1
                table.append(block)
        tables.capacity = best * self.block_size
        tables.indexed = best
        return best * self.block_size

    def index_full_blocks(
        self, tables: BlockTables, tokens: SequenceOf[int], computed: int
    ) -> None:
        """Add to the prefix index the blocks that are full at `computed` positions.

        May be called when the step that computes them is scheduled: in each layer a step writes
        all KV before it reads any, so requests in the same step can share blocks.
        """
        if not self._prefix_cache:
            return
        for i in range(tables.indexed, computed // self.block_size):
            digest = self._digest(tables, tokens, i)
            for g, index in enumerate(self._index):
                block = tables.tables[g][i]
                if block != NULL_BLOCK and digest not in index:
                    index[digest] = block
                    self._entry[block] = (g, digest)
            tables.indexed = i + 1

    def forget_prefixes(self) -> None:
        """Empty the prefix index, when the contents of blocks are uncertain."""
        for index in self._index:
            for block in index.values():
                self._entry[block] = None
            index.clear()
        if self.states is not None:
            self.states.forget()

    def snapshot_row(self, tables: BlockTables, end: int) -> int | None:
        """The row that takes the state at a block's end; None if no snapshot is to be taken."""
        if self.states is None:
            return None
        return self.states.take(tables.digests[end // self.block_size - 1])

    def _digest(self, tables: BlockTables, tokens: SequenceOf[int], i: int) -> bytes:
        """128-bit digest of all tokens up to the end of block i: collisions are negligible."""
        digests = tables.digests
        while len(digests) <= i:
            first = len(digests) * self.block_size
            block = array("q", tokens[first : first + self.block_size]).tobytes()
            prefix = digests[-1] if digests else tables.salt
            digests.append(hashlib.blake2b(prefix + block, digest_size=16).digest())
        return digests[i]

    def _first_attended(self, group: LayerGroup, position: int) -> int:
        """The first block that a token at `position` (or later) attends to."""
        if group.window is None:
            return 0
        return max(0, position - group.window + 1) // self.block_size

    def _free_behind_windows(self, tables: BlockTables, start: int) -> None:
        for g, group in enumerate(self.groups):
            if group.window is None:
                continue
            table = tables.tables[g]
            first = min(self._first_attended(group, start), len(table))
            for i in range(tables.freed[g], first):
                self._drop(table[i])
                table[i] = NULL_BLOCK
            tables.freed[g] = max(first, tables.freed[g])

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        entry = self._entry[block]
        if entry is not None:
            group, digest = entry
            del self._index[group][digest]
            self._entry[block] = None
        self._references[block] = 1
        return block

    def _drop(self, block: int) -> None:
        if block == NULL_BLOCK:
            return
        self._references[block] -= 1
        if not self._references[block]:
            self._free[block] = None
            if self._entry[block] is None:
                self._free.move_to_end(block, last=False)
