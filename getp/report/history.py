"""The course of a job: its counters over time, in bounded memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from engine import EngineStats

_MAX_SAMPLES = 600  # of a job of any length; more are thinned out evenly


@dataclass(frozen=True)
class Moment:
    """What happened since the last moment, and the state at this one."""

    seconds: float  # since the first sample
    output_tok_s: float
    prompt_tok_s: float  # prompt tokens computed
    running: int  # sequences
    waiting: int  # requests that the engine has and has not started
    kv_use: float  # share of the KV blocks that are in use


class History:
    """Samples of an engine's counters."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: list[tuple[float, int, int, int, int, float]] = []
        self._step, self._skipped = 1, 0

    def sample(self, stats: EngineStats) -> None:
        """Note the counters now. Call it at regular intervals."""
        self._skipped += 1
        if self._samples and self._skipped < self._step:
            return
        self._skipped = 0
        kv_use = stats.used_kv_blocks / stats.kv_blocks if stats.kv_blocks else 0.0
        self._samples.append(
            (
                self._clock(),
                stats.generated_tokens,
                stats.prefill_tokens,
                stats.running,
                stats.waiting,
                kv_use,
            )
        )
        if len(self._samples) == _MAX_SAMPLES:
            self._samples = self._samples[::2]
            self._step *= 2

    def moments(self) -> list[Moment]:
        """Return the course of the job; empty for one that ended before the second sample."""
        found = []
        for before, now in zip(self._samples, self._samples[1:], strict=False):
            seconds = max(now[0] - before[0], 1e-9)
            found.append(
                Moment(
                    now[0] - self._samples[0][0],
                    (now[1] - before[1]) / seconds,
                    (now[2] - before[2]) / seconds,
                    *now[3:],
                )
            )
        return found
