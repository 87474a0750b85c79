"""Speculative decoding by prompt lookup, without a draft model.

Text often repeats a part of its prompt or of itself. The tokens that followed an earlier occurrence
of a sequence's last tokens are its draft (Saxena 2023, "Prompt Lookup Decoding"). Each draft token
is computed in the step of the token before it, in a row of its own, exactly as it would be computed
alone: with the sequence's blocks and its own context length. What the model samples in each row is
what it would have sampled without a draft, since random numbers are keyed by position, and a draft
is accepted up to the first token that differs. Results are therefore the same with and without
speculation.

More rows make a step slower. So the length of drafts is chosen for the highest expected number of
tokens per second, from each sequence's acceptance rate (of all proposed tokens, computed or not)
and the measured times of steps.
"""

from collections.abc import Sequence as SequenceOf

from engine.scheduling.kv_cache import KVCache
from engine.scheduling.sequence import Draft, Sequence, Step

MAX_DRAFT_TOKENS = 15  # in a step
_MAX_SEQUENCES = 8  # decoding in a step; larger batches leave little unused
_LIMITS = (0, 1, 2, 3, 5, 7, 10, 15)  # numbers of draft tokens of a sequence that are compared
_SHORTEST_MATCH = 2  # tokens before a draft that must have occurred before
_LONGEST_MATCH = 16  # tokens compared to choose among earlier occurrences
_OCCURRENCES = 4  # earlier occurrences that are kept
_INITIAL_RATE = 0.3  # acceptance rate that a sequence starts with
_SMOOTHING = 0.15  # weight of the newest token in an acceptance rate, and of the newest step's time
_UNMEASURED_ROW = 0.05  # relative time of each row beyond the largest measured step


class Lookup:
    """Proposes one sequence's next tokens, and records its acceptance rate."""

    def __init__(self) -> None:
        self.rate = _INITIAL_RATE
        self._draft: list[int] = []  # the tokens proposed from position _draft_at on
        self._draft_at = 0
        self._positions: dict[tuple[int, ...], list[int]] = {}  # tokens → positions after them
        self._indexed = _SHORTEST_MATCH  # those that end before this position are in _positions

    def propose(self, tokens: SequenceOf[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, of which none was removed since."""
        self._update_rate(tokens)
        for at in range(self._indexed, len(tokens)):  # not those at the very end
            positions = self._positions.setdefault(tuple(tokens[at - _SHORTEST_MATCH : at]), [])
            positions.append(at)
            if len(positions) > _OCCURRENCES:
                del positions[0]
        self._indexed = max(self._indexed, len(tokens))
        self._draft, self._draft_at = [], len(tokens)
        positions = self._positions.get(tuple(tokens[-_SHORTEST_MATCH:]), [])
        if positions:
            best = max(positions, key=lambda at: (_match(tokens, at), at))
            self._draft = list(tokens[best : best + most])
        return self._draft

    def _update_rate(self, tokens: SequenceOf[int]) -> None:
        """Update the acceptance rate by the tokens that followed the last draft."""
        for drafted, token in zip(self._draft, tokens[self._draft_at :], strict=False):
            self.rate += _SMOOTHING * ((drafted == token) - self.rate)
            if drafted != token:
                break


def _match(tokens: SequenceOf[int], at: int) -> int:
    """How many tokens before position `at` are equal to those at the end."""
    most = min(at, _LONGEST_MATCH)
    return next((i for i in range(most) if tokens[at - 1 - i] != tokens[-1 - i]), most)


class Speculation:
    """Adds drafts to steps of few decoding sequences, where that is expected to be faster."""

    def __init__(self, first_row: int):
        """first_row: of MAX_DRAFT_TOKENS rows of the runner that no sequence uses."""
        self._first_row = first_row
        self._seconds: dict[int, float] = {}  # rows of a step of decodes → its time
        self._corrected: list[Sequence] = []  # whose row sampled last is not their last token

    def extend(self, step: Step, cache: KVCache, max_tokens: int) -> None:
        """Add drafts to a step whose sequences have no unread tokens; max_tokens: of the step."""
        step.corrected = [s for s in self._corrected if s.decoding and not s.finished]
        self._corrected = []
        if step.chunks or not 0 < len(step.decodes) <= _MAX_SEQUENCES:
            return
        drafts = [self._propose(sequence) for sequence in step.decodes]
        limit = self._best_limit(step.decodes, drafts)
        row = self._first_row
        end_row = row + min(MAX_DRAFT_TOKENS, max_tokens - step.tokens)
        for sequence, draft in zip(step.decodes, drafts, strict=True):
            tokens = draft[: min(limit, end_row - row)]
            end = sequence.computed + len(tokens)
            if not tokens or not self._has_room(cache, sequence, end, step):
                continue
            step.drafts.append(Draft(sequence, tokens, row))
            step.context_lens += range(sequence.computed + 1, end + 1)
            row += len(tokens)

    def _propose(self, sequence: Sequence) -> list[int]:
        if sequence.lookup is None:
            sequence.lookup = Lookup()
        # A token is sampled after the last draft token. Longrope's factors may change, and what a
        # grammar allows after a draft is not known.
        room = sequence.max_tokens - sequence.length
        is_free = not sequence.rope_context and sequence.matcher is None
        most = min(MAX_DRAFT_TOKENS, room) if is_free else 0
        return sequence.lookup.propose(sequence.tokens, most)

    def _has_room(self, cache: KVCache, sequence: Sequence, end: int, step: Step) -> bool:
        tables = sequence.block_tables
        if end <= tables.capacity:
            return True
        if cache.blocks_for(tables, end) > cache.num_free // 2:  # a draft never causes preemption
            return False
        allocated = cache.allocate(tables, sequence.computed - 1, end)
        if allocated and sequence not in step.changed_tables:
            step.changed_tables.append(sequence)
        return allocated

    def _best_limit(self, sequences: list[Sequence], drafts: list[list[int]]) -> int:
        """The number of draft tokens per sequence with the most expected tokens per second."""
        rates = [s.lookup.rate if s.lookup else 0.0 for s in sequences]
        best, highest = 0, 0.0
        for limit in _LIMITS:
            counts = [min(limit, len(draft)) for draft in drafts]
            if sum(counts) > MAX_DRAFT_TOKENS:
                break
            # n draft tokens, each accepted with probability r, give 1 + r + … + rⁿ tokens.
            tokens = sum(
                sum(rate**i for i in range(count + 1))
                for rate, count in zip(rates, counts, strict=True)
            )
            speed = tokens / self._expected_seconds(len(sequences) + sum(counts))
            if speed > highest:
                best, highest = limit, speed
        return best

    def _expected_seconds(self, rows: int) -> float:
        """The expected time of a step in seconds; a relative time if none was measured."""
        if rows in self._seconds:
            return self._seconds[rows]
        below = max((r for r in self._seconds if r < rows), default=0)
        above = min((r for r in self._seconds if r > rows), default=0)
        if not below:
            return self._seconds[above] if above else 1 + _UNMEASURED_ROW * rows
        if above:
            share = (rows - below) / (above - below)
            return self._seconds[below] + share * (self._seconds[above] - self._seconds[below])
        return self._seconds[below] * (1 + _UNMEASURED_ROW * (rows - below))

    def measured(self, step: Step, seconds: float) -> None:
        """Record the time of a step."""
        if not step.chunks and step.size <= _MAX_SEQUENCES + MAX_DRAFT_TOKENS:
            known = self._seconds.setdefault(step.size, seconds)
            self._seconds[step.size] = known + _SMOOTHING * (seconds - known)

    def settle(self, step: Step) -> int:
        """Update the sequences with drafts; returns how many draft tokens were accepted."""
        accepted = 0
        for draft in step.drafts:
            sequence = draft.sequence
            # If the logits were not finite, nothing was sampled and nothing accepted.
            accepted += max(0, len(sequence.tokens) - 1 - sequence.computed)
            sequence.computed = len(sequence.tokens) - 1
            sequence.length = len(sequence.tokens)
            self._corrected.append(sequence)
        return accepted
