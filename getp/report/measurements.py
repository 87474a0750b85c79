"""The measurements of a job: counts and times, accumulated over its completions."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine import Completion
from getp.report.history import History


class Sample:
    """A series of numbers in bounded memory: a long series keeps evenly spaced values."""

    def __init__(self, max_values: int = 1 << 16) -> None:
        self.values = array("d")
        self._max_values = max_values
        self._step, self._skipped = 1, 0

    def add(self, value: float) -> None:
        """Add a number; it is kept if its position is a multiple of the current step."""
        self._skipped += 1
        if self._skipped < self._step:
            return
        self._skipped = 0
        self.values.append(value)
        if len(self.values) == self._max_values:
            self.values = self.values[1::2]
            self._step *= 2


@dataclass
class Measurements:
    """Counts and times of a job, in memory that does not grow with the number of requests."""

    resumed: int = 0  # requests finished by an earlier run; not included in any other count
    done: int = 0
    failed: int = 0
    ignored: int = 0  # records of the input after the announced number of requests
    cut: int = 0  # completed requests truncated at the length limit
    cut_prompts: int = 0  # requests whose prompt was cut because it was too long
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    warm_up_s: float = 0.0
    inference_s: float = 0.0
    finish_s: float = 0.0
    ttft_s: Sample = field(default_factory=Sample)  # time to first token
    per_token_s: Sample = field(default_factory=Sample)  # mean time per output token after it
    history: History = field(default_factory=History)  # of this run

    @property
    def output_tok_s(self) -> float:
        """Return output tokens per second of inference: the throughput of the job."""
        return self._rate(self.output_tokens)

    @property
    def total_tok_s(self) -> float:
        """Return prompt and output tokens per second of inference."""
        return self._rate(self.prompt_tokens + self.output_tokens)

    @property
    def total_s(self) -> float:
        """Return the seconds of the run, warm-up included."""
        return self.warm_up_s + self.inference_s + self.finish_s

    def add(self, completions: Sequence[Completion]) -> None:
        """Count a request that succeeded, with all of its answers."""
        self.done += 1
        self.cut += any(each.finish_reason == "length" and each.token_ids for each in completions)
        self.prompt_tokens += completions[0].prompt_tokens
        self.cached_tokens += completions[0].cached_tokens
        for completion in completions:
            tokens = len(completion.token_ids)
            self.output_tokens += tokens
            if tokens:
                self.ttft_s.add(completion.first_token - completion.arrived)
            if tokens > 1:
                decoding = completion.finished - completion.first_token
                self.per_token_s.add(decoding / (tokens - 1))

    def _rate(self, tokens: int) -> float:
        return tokens / self.inference_s if self.inference_s > 0 else 0.0


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest value with at least `share` of all values at or below it, or None."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]
