"""Which tokens run in the next step.

One token budget serves prefill chunks and decodes together: running sequences first, in order of
arrival, then new ones while budget, batch size and blocks last. Admission does not reserve the
output; when blocks run out, the sequence that arrived last is preempted and recomputed later
(most of it from the prefix cache).

Steps of decodes alone may be much cheaper to launch than those with chunks, as they are where they
are replayed as graphs. Once there is no room for another sequence, new ones then wait a few steps
for others to leave and start together: of many steps with a chunk each there remains one with many.

A step may be scheduled before the tokens of the one before it are known: that a sequence has met
a stop token is then noticed a step late, and what was computed of it meanwhile is dropped.
"""

from collections import deque
from dataclasses import dataclass, field

from engine.errors import RequestError
from engine.kv_cache import BlockTables, KVCache
from engine.request import Completion, FinishReason, Request, TokenLogprobs

_CALM_STEPS = 128  # before the limits grow again after a lack of memory


@dataclass(eq=False, slots=True)
class Sequence:
    """A request in the engine: its tokens so far and how far their KV is computed."""

    request: Request
    tokens: list[int]  # prompt, then output, as far as it is known
    max_tokens: int  # length at which it ends
    stop_ids: frozenset[int]
    tables: BlockTables
    arrived: float
    length: int = 0  # of `tokens` and those that the launched steps sample
    computed: int = 0  # tokens whose KV the launched steps compute
    row: int = -1  # its place among those that run, whose blocks and last token the runner keeps
    greedy: bool = True  # wants the likeliest token and no more
    decoding: bool = False  # the token to compute next is the one its last step samples
    finished: bool = False
    cached: int = 0  # prompt tokens found in the prefix cache when first admitted
    first_token: float = 0.0
    logprobs: list[TokenLogprobs] | None = None
    admitted: bool = False

    def __post_init__(self) -> None:
        """Nothing is on its way yet."""
        self.length = len(self.tokens)
        params = self.request.params
        self.greedy = params.temperature == 0 and params.logprobs is None

    def append(self, token: int, now: float) -> FinishReason | None:
        """Add an output token; the reason why the sequence ends with it, or None."""
        self.tokens.append(token)
        if not self.first_token:
            self.first_token = now
        told_to_stop = self.request.on_token is not None and self.request.on_token(token)
        if token in self.stop_ids or told_to_stop:
            return "stop"
        return "length" if len(self.tokens) >= self.max_tokens else None

    def completion(
        self, reason: FinishReason, now: float, error: RequestError | None = None
    ) -> Completion:
        """What the caller gets."""
        prompt = len(self.request.prompt_ids)
        return Completion(
            request_id=self.request.request_id,
            token_ids=self.tokens[prompt:],
            finish_reason=reason,
            error=error,
            prompt_tokens=prompt,
            cached_tokens=self.cached,
            logprobs=self.logprobs,
            arrived=self.arrived,
            first_token=self.first_token,
            finished=now,
        )


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of a sequence, all of them known, to be computed in one step."""

    sequence: Sequence
    start: int
    end: int
    samples: bool  # the step yields the sequence's next token


@dataclass
class Step:
    """What one step computes: a token of each decoding sequence, then chunks, the shortest first.

    A decoding sequence's token is the one it sampled last, which the host need not know yet.
    """

    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)  # those of a single token come first
    ends: list[int] = field(default_factory=list)  # positions up to which each sequence gets
    grown: list[Sequence] = field(default_factory=list)  # those whose block tables have changed

    @property
    def size(self) -> int:
        """Sequences."""
        return len(self.ends)

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return len(self.decodes) + sum(chunk.end - chunk.start for chunk in self.chunks)

    def sampling(self) -> list[Sequence]:
        """The sequences that get a next token, in order."""
        return self.decodes + [chunk.sequence for chunk in self.chunks if chunk.samples]


@dataclass
class Scheduler:
    """Waiting and running sequences over one KV cache."""

    cache: KVCache
    max_batch_size: int  # sequences running at once
    max_batch_tokens: int  # tokens computed in one step
    # New ones wait until one in so many of those running has left, or for so many steps; 0: never.
    together: int = 0
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    preemptions: int = 0
    back_offs: int = 0
    lacks_blocks: bool = False  # the first that waits did when it was last looked at
    gathering: bool = False  # there may be room, but more is waited for
    _calm_steps: int = 0  # since the limits last changed
    _full_limits: tuple[int, int] = (0, 0)
    _full: bool = False  # there was no room for the first that waits; since then:
    _left: int = 0  # sequences
    _waited: int = 0  # steps
    _rows: list[int] = field(default_factory=list)  # that no running sequence has

    def __post_init__(self) -> None:
        """Remember the limits that hold while there is memory."""
        self._full_limits = self.max_batch_size, self.max_batch_tokens
        self._rows = list(reversed(range(self.max_batch_size)))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; it must be able to run alone (`KVCache.capacity`)."""
        self.waiting.append(sequence)

    def schedule(self) -> Step:
        """The next step; empty while all that run wait for their last token. Allocates blocks.

        Of the steps before, all but the last must be known (`Sequence.append`).
        """
        step = Step()
        decodes, ends = step.decodes, step.ends
        budget, preemptions = self.max_batch_tokens, self.preemptions
        for sequence in self.running:  # which preemption shortens at its end
            if not budget:
                break
            start = sequence.computed
            if not sequence.decoding:
                end = min(sequence.length, start + budget)
                if self._make_room(sequence, start, end, step):
                    self._plan(sequence, end, step)
                    budget -= end - start
            elif sequence.length < sequence.max_tokens and (
                start < sequence.tables.room or self._make_room(sequence, start, start + 1, step)
            ):
                sequence.computed = start + 1
                sequence.length = start + 2
                decodes.append(sequence)
                ends.append(start + 1)
                budget -= 1
        self.gathering = False
        if preemptions < self.preemptions:
            self.lacks_blocks = True
        elif self._is_to_wait():
            self.gathering = self._left > 0
        else:
            self.lacks_blocks = False
            while self.waiting and budget:
                is_free = len(self.running) < self.max_batch_size
                tokens = self._admit(self.waiting[0], budget, step) if is_free else 0
                if not tokens:
                    self._full, self._left, self._waited = True, 0, 0
                    self.lacks_blocks = is_free
                    break
                self.running.append(self.waiting.popleft())
                budget -= tokens
        step.chunks.sort(key=lambda chunk: chunk.end - chunk.start > 1)  # stable
        ends += [chunk.end for chunk in step.chunks]
        return step

    def _is_to_wait(self) -> bool:
        """Whether those that wait are to wait for more room, to start together."""
        self._waited += self._full
        self._full = (
            self._full
            and self._waited <= self.together
            and self._left * self.together < len(self.running)
            and self._left < len(self.waiting)  # else nobody is there to start with the others
        )
        return self._full

    def back_off(self, step: Step) -> bool:
        """Take back a step that ran out of memory and halve the limits; False: it was the least.

        The steps before it must be known. What the step wrote of KV is not certain, nor is what
        was found in the prefix index since; so everything that runs starts again, in the same
        order.
        """
        tokens = step.tokens
        if tokens <= 1:
            return False
        while self.running:
            victim = self._preempt_last()
            victim.length = len(victim.tokens)
        self.cache.forget_prefixes()
        self.max_batch_size = max(1, step.size // 2)
        self.max_batch_tokens = max(1, tokens // 2)
        self.back_offs += 1
        self._calm_steps = 0
        return True

    def calm(self) -> None:
        """Note a step that had memory enough: after many, the limits grow again.

        Each back-off makes the wait twice as long: one whose cause stays is soon hardly met.
        """
        size, tokens = self._full_limits
        if (self.max_batch_size, self.max_batch_tokens) == self._full_limits:
            return
        self._calm_steps += 1
        if self._calm_steps >= _CALM_STEPS << self.back_offs:
            self.max_batch_size = min(size, 2 * self.max_batch_size)
            self.max_batch_tokens = min(tokens, 2 * self.max_batch_tokens)
            self._calm_steps = 0

    def finish(self, sequences: list[Sequence]) -> None:
        """Take sequences out and give their blocks back, wherever they are.

        A launched step may still compute them: whoever gets the blocks runs after it.
        """
        for sequence in sequences:
            sequence.finished = True
            if sequence.row < 0:
                self.waiting.remove(sequence)
            else:
                self._leave(sequence)
                self._left += 1
        self.running = [sequence for sequence in self.running if not sequence.finished]

    def _leave(self, sequence: Sequence) -> None:
        known = min(sequence.computed, len(sequence.tokens))
        self.cache.index_full_blocks(sequence.tables, sequence.tokens, known)
        self.cache.release(sequence.tables)
        self._rows.append(sequence.row)
        sequence.row = -1
        sequence.computed = 0
        sequence.decoding = False

    def _make_room(self, sequence: Sequence, start: int, end: int, step: Step) -> bool:
        """Allocate [start, end), if need be at the cost of the last to arrive; False: of itself."""
        # All tokens below are known by now, which those that the block's last step sampled were
        # not when it was scheduled.
        self.cache.index_full_blocks(sequence.tables, sequence.tokens, start)
        while not self.cache.allocate(sequence.tables, start, end):
            if self._preempt_last() is sequence:
                return False
        step.grown.append(sequence)
        return True

    def _plan(self, sequence: Sequence, end: int, step: Step) -> None:
        samples = end == sequence.length
        step.chunks.append(Chunk(sequence, sequence.computed, end, samples))
        sequence.computed = end
        sequence.decoding = samples
        sequence.length += samples
        self.cache.index_full_blocks(sequence.tables, sequence.tokens, end)

    def _preempt_last(self) -> Sequence:
        victim = self.running.pop()
        self._leave(victim)
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return victim

    def _admit(self, sequence: Sequence, budget: int, step: Step) -> int:
        """Start a waiting sequence; how many tokens of it, 0 if there is no room.

        Its first chunk must fit, and the running ones keep room: blocks for the rest of the
        prompt, and one a running sequence, so that an admission is not followed at once by a
        preemption.
        """
        room = len(self.running)
        if self.cache.num_free < room:
            return 0
        cached = self.cache.match_prefix(sequence.tables, sequence.tokens)
        end = min(len(sequence.tokens), cached + budget)
        if room:
            room += -(-(len(sequence.tokens) - end) // self.cache.block_size)
        needed = self.cache.blocks_for(sequence.tables, end)
        fits = needed + room <= self.cache.num_free
        if not fits or not self.cache.allocate(sequence.tables, cached, end):
            self.cache.release(sequence.tables)
            return 0
        sequence.row = self._rows.pop()
        sequence.computed = cached
        if not sequence.admitted:
            sequence.admitted = True
            sequence.cached = min(cached, len(sequence.request.prompt_ids))
        step.grown.append(sequence)
        self._plan(sequence, end, step)
        return end - cached
