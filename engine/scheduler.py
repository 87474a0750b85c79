"""Which tokens run in the next step.

One token budget serves prefill chunks and decodes together: running sequences first, in order of
arrival, then new ones while budget, batch size and blocks last. Admission does not reserve the
output; when blocks run out, the sequence that arrived last is preempted and recomputed later
(most of it from the prefix cache).
"""

from collections import deque
from dataclasses import dataclass, field

from engine.kv_cache import BlockTables, KVCache
from engine.request import Completion, FinishReason, Request, TokenLogprobs

_CALM_STEPS = 128  # before the limits grow again after a lack of memory


@dataclass(eq=False)
class Sequence:
    """A request in the engine: its tokens so far and how far their KV is computed."""

    request: Request
    tokens: list[int]  # prompt, then output
    max_tokens: int  # length at which it ends
    stop_ids: frozenset[int]
    tables: BlockTables
    arrived: float
    computed: int = 0
    cached: int = 0  # prompt tokens found in the prefix cache when first admitted
    first_token: float = 0.0
    logprobs: list[TokenLogprobs] | None = None
    admitted: bool = False

    def append(self, token: int, logprobs: TokenLogprobs | None, now: float) -> FinishReason | None:
        """Add an output token; the reason why the sequence ends with it, or None."""
        self.tokens.append(token)
        if not self.first_token:
            self.first_token = now
        if self.logprobs is not None and logprobs is not None:
            self.logprobs.append(logprobs)
        told_to_stop = self.request.on_token is not None and self.request.on_token(token)
        if token in self.stop_ids or told_to_stop:
            return "stop"
        return "length" if len(self.tokens) >= self.max_tokens else None

    def completion(self, reason: FinishReason, now: float) -> Completion:
        """What the caller gets."""
        prompt = len(self.request.prompt_ids)
        return Completion(
            request_id=self.request.request_id,
            token_ids=self.tokens[prompt:],
            finish_reason=reason,
            prompt_tokens=prompt,
            cached_tokens=self.cached,
            logprobs=self.logprobs,
            arrived=self.arrived,
            first_token=self.first_token,
            finished=now,
        )


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    end: int
    samples: bool  # the step yields the sequence's next token


@dataclass
class Scheduler:
    """Waiting and running sequences over one KV cache."""

    cache: KVCache
    max_batch_size: int  # sequences running at once
    max_batch_tokens: int  # tokens computed in one step
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    preemptions: int = 0
    back_offs: int = 0
    _calm_steps: int = 0  # since the limits last changed
    _full_limits: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Remember the limits that hold while there is memory."""
        self._full_limits = self.max_batch_size, self.max_batch_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; it must be able to run alone (`KVCache.capacity`)."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step: sequences with a single token first, then chunks. Allocates blocks."""
        budget, chunks = self.max_batch_tokens, []
        preempted = False
        at = 0
        while at < len(self.running) and budget:
            sequence = self.running[at]
            start = sequence.computed
            end = min(len(sequence.tokens), start + budget)
            while not self.cache.allocate(sequence.tables, start, end):
                preempted = True
                if self._preempt_last() is sequence:
                    break
            else:
                chunks.append(self._plan(sequence, end))
                budget -= end - start
                at += 1
        while not preempted and self.waiting and budget and len(self.running) < self.max_batch_size:
            chunk = self._admit(self.waiting[0], budget)
            if chunk is None:
                break
            self.running.append(self.waiting.popleft())
            chunks.append(chunk)
            budget -= chunk.end - chunk.start
        chunks.sort(key=lambda chunk: chunk.end - chunk.start > 1)  # stable
        return chunks

    def back_off(self, chunks: list[Chunk]) -> bool:
        """Take back a step that ran out of memory and halve the limits; False: it was the least.

        What the step wrote of KV is not certain, nor is what was found in the prefix index since;
        so everything that runs starts again, in the same order.
        """
        tokens = sum(chunk.end - chunk.start for chunk in chunks)
        if tokens <= 1:
            return False
        while self.running:
            self._preempt_last()
        self.cache.forget_prefixes()
        self.max_batch_size = max(1, len(chunks) // 2)
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

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out and give its blocks back, wherever it is."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.cache.release(sequence.tables)

    def _plan(self, sequence: Sequence, end: int) -> Chunk:
        chunk = Chunk(sequence, sequence.computed, end, end == len(sequence.tokens))
        sequence.computed = end
        self.cache.index_full_blocks(sequence.tables, sequence.tokens, end)
        return chunk

    def _preempt_last(self) -> Sequence:
        victim = self.running.pop()
        self.cache.release(victim.tables)
        victim.computed = 0
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return victim

    def _admit(self, sequence: Sequence, budget: int) -> Chunk | None:
        """Start a waiting sequence if its first chunk fits and the running ones keep room.

        The room: blocks for the rest of the prompt, and one a running sequence, so that an
        admission is not followed at once by a preemption.
        """
        room = len(self.running)
        if self.cache.num_free < room:
            return None
        cached = self.cache.match_prefix(sequence.tables, sequence.tokens)
        end = min(len(sequence.tokens), cached + budget)
        if room:
            room += -(-(len(sequence.tokens) - end) // self.cache.block_size)
        needed = self.cache.blocks_for(sequence.tables, end)
        fits = needed + room <= self.cache.num_free
        if not fits or not self.cache.allocate(sequence.tables, cached, end):
            self.cache.release(sequence.tables)
            return None
        sequence.computed = cached
        if not sequence.admitted:
            sequence.admitted = True
            sequence.cached = min(cached, len(sequence.request.prompt_ids))
        return self._plan(sequence, end)
