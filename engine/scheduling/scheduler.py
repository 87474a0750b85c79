"""Chooses the tokens of the next step.

One token budget serves prefill chunks and decodes together: running sequences first, in order of
arrival, then waiting ones while token budget, batch size and free blocks allow. Admission does not
reserve memory for the output; when blocks run out, the sequence that arrived last is preempted and
recomputed later (most of it from the prefix cache).

Requests with a lower `priority` number come first in everything: in the order of both queues, in
the token budget, and in memory: for a waiting one, running sequences with a higher number are
preempted. While there are requests with the lowest number, the others have only a part of the
token budget, so that steps stay short.

A step of decodes alone can be much cheaper to launch than one with chunks, if it is replayed as a
graph. With `group_size` set, waiting sequences are therefore admitted in groups once the batch is
full: one step with many chunks replaces many steps with one chunk each.

A step may be scheduled before the tokens of the previous one are known. A sequence that samples a
stop token is then computed for one more step, whose result is dropped.
"""

import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field

from engine.scheduling.kv_cache import KVCache
from engine.scheduling.sequence import Chunk, Sequence, Step
from engine.scheduling.speculation import Speculation

_SHARED_PART = 4  # one in so many tokens of a step is for requests that are not the first
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
    # Both sorted by priority, sequences with the same one by arrival.
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    preemptions: int = 0
    back_offs: int = 0
    lacks_blocks: bool = False  # too few free blocks for the first waiting sequence, as last seen
    # Sequences with a thinking budget whose last token, or the one that is sampled now, is forced.
    forced: list[Sequence] = field(default_factory=list)
    gathering: bool = False  # sequences have finished, but admission waits for a larger group
    _successes: int = 0  # steps since the limits last changed
    _full_limits: tuple[int, int] = (0, 0)
    _full: bool = False  # there was no room for the first waiting sequence
    _finished_since_full: int = 0  # sequences
    _steps_since_full: int = 0
    _free_rows: list[int] = field(default_factory=list)
    _preempted: float = math.inf  # the lowest priority of a sequence preempted in this step

    def __post_init__(self) -> None:
        """Remember the given limits, to which a back-off returns in the end."""
        self._full_limits = self.max_batch_size, self.max_batch_tokens
        self._free_rows = list(reversed(range(self.max_batch_size)))

    @property
    def free_rows(self) -> list[int]:
        """Rows that no running sequence uses."""
        return list(self._free_rows)

    @property
    def first_waiting(self) -> int:
        """The number of waiting sequences with priority 0 or lower."""
        return bisect_right(self.waiting, 0, key=lambda sequence: sequence.priority)

    @property
    def _shared_tokens(self) -> int:
        """Tokens of all but the first sequences in a step: enough for their decodes."""
        return max(self.max_batch_size, self.max_batch_tokens // _SHARED_PART)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; it must be able to run alone (`KVCache.capacity`)."""
        at = len(self.waiting)
        while at and self.waiting[at - 1].priority > sequence.priority:
            at -= 1
        self.waiting.insert(at, sequence)

    def schedule(self) -> Step:
        """The next step, with its blocks allocated; empty if every last token is scheduled.

        The tokens of all earlier steps but the last must be known (`Sequence.append`).
        """
        step = Step(forced=[s for s in self.forced if s.decoding and not s.finished])
        self.forced.clear()
        if self.cache.states is not None:
            self.cache.states.begin_step()
        budget, self._preempted, self.gathering = self.max_batch_tokens, math.inf, False
        outgrown: list[Sequence] = []
        priorities = self._priorities()
        for priority in priorities:
            if priority != priorities[0]:  # a short step, since the first ones wait for its end
                budget = min(budget, self._shared_tokens)
            budget = self._continue_running(priority, budget, step, outgrown)
            if self._preempted <= priority:
                self.lacks_blocks = True
            elif priority == priorities[-1] and self._waits_for_group():
                self.gathering = self._finished_since_full > 0
            else:
                budget = self._admit_waiting(priority, budget, step)
        self._restart(outgrown)
        step.forced = [sequence for sequence in step.forced if sequence.row >= 0]
        step.chunks.sort(key=lambda chunk: chunk.end - chunk.start > 1)  # stable
        step.context_lens += [chunk.end for chunk in step.chunks]
        if self.speculation is not None:
            self.speculation.extend(step, self.cache, self.max_batch_tokens)
        return step

    def _priorities(self) -> list[int]:
        """The priorities of all sequences, the first to run first; at least one."""
        ends = {
            queue[i].priority for queue in (self.running, self.waiting) if queue for i in (0, -1)
        }
        if len(ends) < 2:
            return [*ends] or [0]
        return sorted({sequence.priority for sequence in (*self.running, *self.waiting)})

    def _continue_running(
        self, priority: int, budget: int, step: Step, outgrown: list[Sequence]
    ) -> int:
        """Plan the next tokens of running sequences with this priority; returns the budget left.

        outgrown: receives those that must be recomputed from their beginning.
        """
        for sequence in self.running:  # preemption shortens this list at its end
            if not budget:
                break
            if sequence.priority != priority:
                continue
            start = sequence.computed
            if start == sequence.length:  # it has no output, and is complete when it is read
                continue
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
                step.decodes.append(sequence)
                step.context_lens.append(start + 1)
                budget -= 1
        return budget

    def _restart(self, sequences: list[Sequence]) -> None:
        """Return sequences to the queue, to be recomputed with the long factors of longrope.

        They can restart in the next step, when all of their tokens are known.
        """
        for sequence in reversed(sequences):
            if sequence.row >= 0:  # not preempted since
                self.running.remove(sequence)
                self._release(sequence)
                self._return_to_queue(sequence)

    def _return_to_queue(self, sequence: Sequence) -> None:
        """Queue a sequence that ran before, as the first with its priority."""
        at = 0
        while at < len(self.waiting) and self.waiting[at].priority < sequence.priority:
            at += 1
        self.waiting.insert(at, sequence)

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

    def _admit_waiting(self, priority: int, budget: int, step: Step) -> int:
        """Start waiting sequences with this priority, in order; returns the budget left."""
        self.lacks_blocks = False
        while budget and self.waiting and self.waiting[0].priority == priority:
            sequence = self.waiting[0]
            has_row = len(self.running) < self.max_batch_size
            tokens = self._admit(sequence, budget, step) if has_row else 0
            if tokens:
                self.waiting.popleft()
                at = bisect_right(self.running, priority, key=lambda each: each.priority)
                self.running.insert(at, sequence)
                budget -= tokens
            elif (
                self.running
                and self.running[-1].priority > priority
                and not sequence.block_tables.awaits_snapshot
            ):
                self._preempt_last()
            else:
                self._full, self._finished_since_full, self._steps_since_full = True, 0, 0
                self.lacks_blocks = has_row
                break
        return budget

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
        sequence.forget_unread_scores()
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
        samples = end == sequence.length < sequence.max_tokens
        prompt = len(sequence.request.prompt_ids)
        scored = range(max(sequence.next_scored, sequence.computed + 1), min(end + 1, prompt))
        sequence.next_scored = max(sequence.next_scored, scored.stop)
        step.chunks.append(Chunk(sequence, sequence.computed, end, samples, scored))
        sequence.computed = end
        sequence.decoding = samples
        sequence.length += samples
        if samples and sequence.thinking is not None and sequence.thinking.forced is not None:
            self.forced.append(sequence)
        self.cache.index_full_blocks(sequence.block_tables, sequence.tokens, end)
        if end == sequence.snapshot_at:
            row = self.cache.snapshot_row(sequence.block_tables, end)
            if row is not None:
                step.saved.append((sequence.row, row))

    def _preempt_last(self) -> Sequence:
        victim = self.running.pop()
        self._release(victim)
        self._return_to_queue(victim)
        self._preempted = min(self._preempted, victim.priority)
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
        known = sequence.tokens
        if sequence.next_scored < len(sequence.request.prompt_ids):
            known = known[: sequence.next_scored]  # scoring needs the row before
        cached = self.cache.match_prefix(tables, known)
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
