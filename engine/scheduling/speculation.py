"""Speculation by prompt lookup: guessed next tokens are computed in the step of the token before.

Text often repeats a part of its prompt or of itself. The tokens that followed the last occurrence
of a sequence's last tokens are taken as a guess (Saxena 2023, "Prompt Lookup Decoding"). Each
guessed token is computed in a row of its own, exactly as it would be computed alone: with the
sequence's blocks and its own context length. What the model samples at each row is what it would
have sampled without a guess, since random numbers are keyed by position, and guesses are kept up to
the first that differs. Results are therefore the same with and without speculation.

More rows make a step slower, so guesses are computed only as far as they are expected to gain: by
how often the guesses for each sequence were right, also those that were not computed, and by the
measured times of steps.
"""

from collections.abc import Sequence as SequenceOf

from engine.scheduling.kv_cache import KVCache
from engine.scheduling.sequence import Draft, Sequence, Step

MOST_GUESSES = 15  # guessed tokens in a step
_MOST_SEQUENCES = 8  # decoding in a step; larger batches leave little unused
_LIMITS = (0, 1, 2, 3, 5, 7, 10, 15)  # guessed tokens of each sequence that are compared
_LONGEST_MATCH = 16  # tokens that are compared to choose among earlier occurrences
_OCCURRENCES = 4  # that are compared
_FIRST_RATE = 0.3  # share of right guesses that a sequence starts with
_SMOOTHING = 0.15  # weight of the newest guess in a sequence's rate, and of the newest step's time
_UNMEASURED_ROW = 0.05  # relative time of a row more than in any step that was measured


class Lookup:
    """Guesses of one sequence's next tokens, and how often they were right."""

    def __init__(self) -> None:
        self.rate = _FIRST_RATE
        self._guess: list[int] = []  # of the tokens from position _guessed_at on
        self._guessed_at = 0
        self._places: dict[tuple[int, int], list[int]] = {}  # a pair of tokens → positions after it
        self._indexed = 2  # pairs that end before this position are in _places

    def guess(self, tokens: SequenceOf[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, of which none was removed since."""
        self._judge(tokens)
        for at in range(self._indexed, len(tokens)):  # not the pair at the very end
            places = self._places.setdefault((tokens[at - 2], tokens[at - 1]), [])
            places.append(at)
            if len(places) > _OCCURRENCES:
                del places[0]
        self._indexed = max(self._indexed, len(tokens))
        self._guess, self._guessed_at = [], len(tokens)
        places = self._places.get((tokens[-2], tokens[-1]), []) if len(tokens) > 1 else []
        if places:
            best = max(places, key=lambda at: (_match(tokens, at), at))
            self._guess = list(tokens[best : best + most])
        return self._guess

    def _judge(self, tokens: SequenceOf[int]) -> None:
        """Update the rate by the tokens that followed the last guess."""
        for guessed, token in zip(self._guess, tokens[self._guessed_at :], strict=False):
            self.rate += _SMOOTHING * ((guessed == token) - self.rate)
            if guessed != token:
                break


def _match(tokens: SequenceOf[int], at: int) -> int:
    """How many tokens before position `at` are equal to those at the end."""
    most = min(at, _LONGEST_MATCH)
    return next((i for i in range(most) if tokens[at - 1 - i] != tokens[-1 - i]), most)


class Speculation:
    """Adds guesses to steps of few decoding sequences, where that is expected to gain."""

    def __init__(self, first_row: int):
        """first_row: of MOST_GUESSES rows of the runner that no sequence uses."""
        self._first_row = first_row
        self._seconds: dict[int, float] = {}  # rows of a step of decodes → its time
        self._corrected: list[Sequence] = []  # whose row sampled last is not their last token

    def extend(self, step: Step, cache: KVCache, max_tokens: int) -> None:
        """Add guesses to a step whose sequences have no unread tokens; max_tokens: of the step."""
        step.corrected = [s for s in self._corrected if s.decoding and not s.finished]
        self._corrected = []
        if step.chunks or not 0 < len(step.decodes) <= _MOST_SEQUENCES:
            return
        guesses = [self._guess(sequence) for sequence in step.decodes]
        limit = self._best_limit(step.decodes, guesses)
        row = self._first_row
        end_row = row + min(MOST_GUESSES, max_tokens - step.tokens)
        for sequence, guess in zip(step.decodes, guesses, strict=True):
            tokens = guess[: min(limit, end_row - row)]
            end = sequence.computed + len(tokens)
            if not tokens or not self._has_room(cache, sequence, end, step):
                continue
            step.drafts.append(Draft(sequence, tokens, row))
            step.context_lens += range(sequence.computed + 1, end + 1)
            row += len(tokens)

    def _guess(self, sequence: Sequence) -> list[int]:
        if sequence.lookup is None:
            sequence.lookup = Lookup()
        # The last token may be sampled after the last guess, and longrope's factors may change.
        room = sequence.max_tokens - sequence.length
        most = 0 if sequence.rope_context else min(MOST_GUESSES, room)
        return sequence.lookup.guess(sequence.tokens, most)

    def _has_room(self, cache: KVCache, sequence: Sequence, end: int, step: Step) -> bool:
        tables = sequence.block_tables
        if end <= tables.capacity:
            return True
        if cache.blocks_for(tables, end) > cache.num_free // 2:  # guesses preempt nobody
            return False
        allocated = cache.allocate(tables, sequence.computed - 1, end)
        if allocated and sequence not in step.changed_tables:
            step.changed_tables.append(sequence)
        return allocated

    def _best_limit(self, sequences: list[Sequence], guesses: list[list[int]]) -> int:
        """The number of guessed tokens of each sequence with the most tokens a second."""
        rates = [s.lookup.rate if s.lookup else 0.0 for s in sequences]
        best, highest = 0, 0.0
        for limit in _LIMITS:
            counts = [min(limit, len(guess)) for guess in guesses]
            if sum(counts) > MOST_GUESSES:
                break
            # Of n guesses, each right with probability r, 1 + r + r² + … + rⁿ tokens are sampled.
            tokens = sum(
                sum(rate**i for i in range(count + 1))
                for rate, count in zip(rates, counts, strict=True)
            )
            speed = tokens / self._expected_seconds(len(sequences) + sum(counts))
            if speed > highest:
                best, highest = limit, speed
        return best

    def _expected_seconds(self, rows: int) -> float:
        """The expected time of a step; relative if none was measured."""
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
        """Note the time of a step."""
        if not step.chunks and step.size <= _MOST_SEQUENCES + MOST_GUESSES:
            known = self._seconds.setdefault(step.size, seconds)
            self._seconds[step.size] = known + _SMOOTHING * (seconds - known)

    def settle(self, step: Step) -> int:
        """Set what is computed of the sequences with guesses; returns how many were right."""
        right = 0
        for draft in step.drafts:
            sequence = draft.sequence
            # Without a token at all, if the logits were not finite, none was right.
            right += max(0, len(sequence.tokens) - 1 - sequence.computed)
            sequence.computed = len(sequence.tokens) - 1
            sequence.length = len(sequence.tokens)
            self._corrected.append(sequence)
        return right
