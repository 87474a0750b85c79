"""Chooses the tokens of the next step.

One token budget serves prefill chunks and decodes together: running sequences first, in order of
arrival, then waiting ones while token budget, batch size and free blocks allow. Admission does not
reserve memory for the output; when blocks run out, the sequence that arrived last is preempted and
recomputed later (most of it from the prefix cache).

A step of decodes alone can be much cheaper to launch than one with chunks, if it is replayed as a
graph. With `group_size` set, waiting sequences are therefore admitted in groups once the batch is
full: one step with many chunks replaces many steps with one chunk each.

A step may be scheduled before the tokens of the previous one are known. A sequence that samples a
stop token is then computed for one more step, whose result is dropped.
"""

from collections import deque
from dataclasses import dataclass, field

from engine.scheduling.kv_cache import KVCache
from engine.scheduling.sequence import Chunk, Sequence, Step
from engine.scheduling.speculation import Speculation

_STEPS_BEFORE_GROWTH = 128  # successful steps after a back-off until the limits grow again


@dataclass
class Scheduler:
    """Waiting and running sequences over one KV cache."""

    cache: KVCache
    max_batch_size: int  # sequences running at once
    max_batch_tokens: int  # tokens computed in one step
    # While the batch is full, admission waits until one in `group_size` running sequences has
    # finished, for at most `group_size` steps. 0: sequences are admitted as soon as there is room.
    group_size: int = 0
    speculation: Speculation | None = None  # only if the tokens of every earlier step are known
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    preemptions: int = 0
    back_offs: int = 0
    lacks_blocks: bool = False  # too few free blocks for the first waiting sequence, as last seen
    gathering: bool = False  # sequences have finished, but admission waits for a larger group
    _successes: int = 0  # steps since the limits last changed
    _full_limits: tuple[int, int] = (0, 0)
    _full: bool = False  # there was no room for the first waiting sequence
    _finished_since_full: int = 0  # sequences
    _steps_since_full: int = 0
    _free_rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Remember the given limits, to which a back-off returns in the end."""
        self._full_limits = self.max_batch_size, self.max_batch_tokens
        self._free_rows = list(reversed(range(self.max_batch_size)))

    @property
    def free_rows(self) -> list[int]:
        """Rows that no running sequence uses."""
        return list(self._free_rows)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; it must be able to run alone (`KVCache.capacity`)."""
        self.waiting.append(sequence)

    def schedule(self) -> Step:
        """The next step, with its blocks allocated; empty if every last token is scheduled.

        The tokens of all earlier steps but the last must be known (`Sequence.append`).
        """
        step = Step()
        if self.cache.states is not None:
            self.cache.states.begin_step()
        decodes, context_lens = step.decodes, step.context_lens
        budget, preemptions = self.max_batch_tokens, self.preemptions
        outgrown = []
        for sequence in self.running:  # preemption shortens this list at its end
            if not budget:
                break
            start = sequence.computed
            if not sequence.decoding:
                end = _chunk_end(sequence, start, min(sequence.length, start + budget))
                if self._make_room(sequence, start, end, step):
                    self._plan(sequence, end, step)
                    budget -= end - start
            elif sequence.length < sequence.max_tokens and start == sequence.rope_context:
                outgrown.append(sequence)
            elif sequence.length < sequence.max_tokens and (
                start < sequence.block_tables.capacity
                or self._make_room(sequence, start, start + 1, step)
            ):
                sequence.computed = start + 1
                sequence.length = start + 2
                decodes.append(sequence)
                context_lens.append(start + 1)
                budget -= 1
        self.gathering = False
        if preemptions < self.preemptions:
            self.lacks_blocks = True
        elif self._waits_for_group():
            self.gathering = self._finished_since_full > 0
        else:
            self._admit_waiting(budget, step)
        self._restart(outgrown)
        step.chunks.sort(key=lambda chunk: chunk.end - chunk.start > 1)  # stable
        context_lens += [chunk.end for chunk in step.chunks]
        if self.speculation is not None:
            self.speculation.extend(step, self.cache, self.max_batch_tokens)
        return step

    def _restart(self, sequences: list[Sequence]) -> None:
        """Return sequences to the queue, to be recomputed with the long factors of longrope.

        They can restart in the next step, when all of their tokens are known.
        """
        for sequence in reversed(sequences):
            if sequence.row >= 0:  # not preempted since
                self.running.remove(sequence)
                self._release(sequence)
                self.waiting.appendleft(sequence)

    def _waits_for_group(self) -> bool:
        """Whether admission waits for more sequences to finish; counts the steps that it waits."""
        self._steps_since_full += self._full
        self._full = (
            self._full
            and self._steps_since_full <= self.group_size
            and self._finished_since_full * self.group_size < len(self.running)
            and self._finished_since_full < len(self.waiting)  # else a larger group cannot form
        )
        return self._full

    def _admit_waiting(self, budget: int, step: Step) -> None:
        """Start waiting sequences, in order, while there is room."""
        self.lacks_blocks = False
        while self.waiting and budget:
            has_row = len(self.running) < self.max_batch_size
            tokens = self._admit(self.waiting[0], budget, step) if has_row else 0
            if not tokens:
                self._full, self._finished_since_full, self._steps_since_full = True, 0, 0
                self.lacks_blocks = has_row
                break
            self.running.append(self.waiting.popleft())
            budget -= tokens

    def back_off(self, step: Step) -> bool:
        """Undo a step that ran out of memory and halve the limits.

        False if the step computed a single token: there is nothing left to halve. The tokens of
        all earlier steps must be known. The KV that the step was to write is uncertain, and so is
        every prefix that was matched since; all running sequences are therefore preempted, and
        start again in the same order.
        """
        tokens = step.tokens
        if tokens <= 1:
            return False
        while self.running:
            victim = self._preempt_last()
            victim.length = len(victim.tokens)
        self.cache.forget_prefixes()
        # With drafts a step may have more rows than the limit on sequences.
        self.max_batch_size = max(1, min(self.max_batch_size, step.size // 2))
        self.max_batch_tokens = max(1, tokens // 2)
        self.back_offs += 1
        self._successes = 0
        return True

    def note_success(self) -> None:
        """Count a step that had enough memory; after enough of them the limits double again.

        Each back-off doubles the number of steps that are enough, so a persistent cause is
        retried ever more rarely.
        """
        size, tokens = self._full_limits
        if (self.max_batch_size, self.max_batch_tokens) == self._full_limits:
            return
        self._successes += 1
        if self._successes >= _STEPS_BEFORE_GROWTH << self.back_offs:
            self.max_batch_size = min(size, 2 * self.max_batch_size)
            self.max_batch_tokens = min(tokens, 2 * self.max_batch_tokens)
            self._successes = 0

    def finish(self, sequences: list[Sequence]) -> None:
        """Remove running or waiting sequences and free their blocks.

        A launched step may still use the blocks. That is safe: steps run in order, so their next
        owner writes them later.
        """
        for sequence in sequences:
            sequence.finished = True
            if sequence.row < 0:
                self.waiting.remove(sequence)
            else:
                self._release(sequence)
                self._finished_since_full += 1
        self.running = [sequence for sequence in self.running if not sequence.finished]

    def _release(self, sequence: Sequence) -> None:
        """Free the blocks and the row of a running sequence."""
        known = min(sequence.computed, len(sequence.tokens))
        self.cache.index_full_blocks(sequence.block_tables, sequence.tokens, known)
        self.cache.release(sequence.block_tables)
        self._free_rows.append(sequence.row)
        sequence.row = -1
        sequence.computed = 0
        sequence.decoding = False

    def _make_room(self, sequence: Sequence, start: int, end: int, step: Step) -> bool:
        """Allocate [start, end), preempting the latest arrivals if needed.

        False if the sequence itself was preempted.
        """
        # When the last step was scheduled, the tokens that it samples were not known; all tokens
        # below `start` are known now, so blocks that have become full can be indexed.
        self.cache.index_full_blocks(sequence.block_tables, sequence.tokens, start)
        while not self.cache.allocate(sequence.block_tables, start, end):
            if self._preempt_last() is sequence:
                return False
        step.changed_tables.append(sequence)
        return True

    def _plan(self, sequence: Sequence, end: int, step: Step) -> None:
        """Add the sequence's tokens up to `end` to the step."""
        samples = end == sequence.length
        step.chunks.append(Chunk(sequence, sequence.computed, end, samples))
        sequence.computed = end
        sequence.decoding = samples
        sequence.length += samples
        self.cache.index_full_blocks(sequence.block_tables, sequence.tokens, end)
        if end == sequence.snapshot_at:
            row = self.cache.snapshot_row(sequence.block_tables, end)
            if row is not None:
                step.saved.append((sequence.row, row))

    def _preempt_last(self) -> Sequence:
        victim = self.running.pop()
        self._release(victim)
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return victim

    def _admit(self, sequence: Sequence, budget: int, step: Step) -> int:
        """Start a waiting sequence; returns the tokens in its first chunk, 0 if there is no room.

        Besides the blocks of its first chunk, blocks must be free for the rest of its prompt and
        one for each running sequence, so that an admission does not cause a preemption at once.
        """
        spare = len(self.running)
        if self.cache.num_free < spare:
            return 0
        if 0 < sequence.rope_context < len(sequence.tokens):
            sequence.block_tables.use_salt(b"long")
        tables = sequence.block_tables
        cached = self.cache.match_prefix(tables, sequence.tokens)
        if tables.awaits_snapshot:
            self.cache.release(tables)
            return 0
        sequence.snapshot_at = tables.shared if tables.shared > cached else 0
        end = _chunk_end(sequence, cached, min(len(sequence.tokens), cached + budget))
        if spare:
            spare += -(-(len(sequence.tokens) - end) // self.cache.block_size)
        needed = self.cache.blocks_for(sequence.block_tables, end)
        fits = needed + spare <= self.cache.num_free
        if not fits or not self.cache.allocate(sequence.block_tables, cached, end):
            self.cache.release(sequence.block_tables)
            return 0
        sequence.row = self._free_rows.pop()
        sequence.computed = cached
        if cached and self.cache.states is not None:
            digest = tables.digests[cached // self.cache.block_size - 1]
            step.restored.append((self.cache.states.use(digest), sequence.row))
        if not sequence.admitted:
            sequence.admitted = True
            sequence.cached = min(cached, len(sequence.request.prompt_ids))
        step.changed_tables.append(sequence)
        self._plan(sequence, end, step)
        return end - cached


def _chunk_end(sequence: Sequence, start: int, end: int) -> int:
    """The end of a chunk, which is at the position of the sequence's snapshot if it passes it."""
    return sequence.snapshot_at if start < sequence.snapshot_at < end else end
