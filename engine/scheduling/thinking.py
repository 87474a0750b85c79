"""Follows how much a model thinks, and says which tokens end its thinking."""

from engine.sampling_params import ThinkingBudget


class Thinking:
    """The thinking of one sequence; see `ThinkingBudget`. It depends on the output alone."""

    def __init__(self, budget: ThinkingBudget):
        self._budget = budget
        self._is_open = budget.is_open
        self._thought = 0
        self._last: list[int] = []  # the newest tokens, as many as a marker has
        self._forced: list[int] = []  # tokens that are still to be written
        self.was_forced = False  # the last token was written
        self._limit()

    @property
    def forced(self) -> int | None:
        """The token that the next one must be, whatever the model samples; None: any."""
        return self._forced[0] if self._forced else None

    def append(self, token: int) -> None:
        """Follow the next token of the output."""
        self.was_forced = bool(self._forced)
        if self._forced:
            del self._forced[0]
            return
        budget = self._budget
        longest = max(len(budget.start_ids), len(budget.end_ids))
        self._last = [*self._last, token][-longest:]
        if not self._is_open:
            self._is_open = self._ends_with(budget.start_ids)
        elif self._ends_with(budget.end_ids):
            self._is_open = False
        else:
            self._thought += 1
        self._limit()

    def _limit(self) -> None:
        if self._is_open and self._thought >= self._budget.max_tokens:
            self._forced = [*self._budget.forced_ids]
            self._is_open, self._last = False, []

    def _ends_with(self, marker: tuple[int, ...]) -> bool:
        return bool(marker) and tuple(self._last[-len(marker) :]) == marker
