"""Snapshots of the states of recurrent layers, so that cached prefixes can be continued.

A sequence has keys and values of every position, but only the state after its last one. So a prefix
is found only as far as there is a snapshot of its state, which is taken at the end of a block.
Snapshots are found by the digest of the tokens before them. One is taken where a sequence has
blocks in common with an earlier one, because others may then share the prefix, too. The least
recently used one is replaced.
"""

from collections import OrderedDict


class StateCache:
    """The rows of snapshots among the rows of states; integers alone."""

    def __init__(self, first_row: int, snapshots: int):
        """Rows first_row … first_row + snapshots - 1 are for snapshots."""
        self._free = list(range(first_row, first_row + snapshots))
        self._rows: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first
        # Digests of those that the step which is being scheduled takes, after it has computed.
        self._pending: set[bytes] = set()

    def begin_step(self) -> None:
        """Note that the following snapshots are of a new step."""
        self._pending.clear()

    def has(self, digest: bytes) -> bool:
        """Whether a sequence that starts in this step can begin from the snapshot."""
        return digest in self._rows and digest not in self._pending

    def is_pending(self, digest: bytes) -> bool:
        """Whether the step that is being scheduled takes the snapshot."""
        return digest in self._pending

    def use(self, digest: bytes) -> int:
        """The row of a snapshot, which becomes the most recently used."""
        self._rows.move_to_end(digest)
        return self._rows[digest]

    def take(self, digest: bytes) -> int | None:
        """The row for a new snapshot; None if it exists, or if this step replaces all others."""
        if digest in self._rows:
            return None
        if not self._free:
            oldest = next((each for each in self._rows if each not in self._pending), None)
            if oldest is None:
                return None
            self._free.append(self._rows.pop(oldest))
        row = self._rows[digest] = self._free.pop()
        self._pending.add(digest)
        return row

    def forget(self) -> None:
        """Drop all snapshots, when their contents are uncertain."""
        self._free += self._rows.values()
        self._rows.clear()
        self._pending.clear()
