"""The progress of a job is true: its speed, the requests that failed, the time left."""

import io
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rich.console

from engine import Engine, EngineConfig, EngineStats, Request, SamplingParams
from getp.job import progress as job_progress
from getp.job.progress import Tracker, progress
from tests.getp.helpers import fake_engine
from tests.getp.test_job import job, run

ROOT = Path(__file__).parents[2]


@dataclass
class Counts:
    total: int
    done: int = 0
    failed: int = 0


class SimulatedJob:
    """Requests of given lengths; 32 run at once, each gets a token every 50 ms."""

    def __init__(self, lengths: Sequence[int], batch: int = 32, done: int = 0) -> None:
        self.counts, self.stats, self.now = Counts(len(lengths) + done, done), EngineStats(), 0.0
        self._waiting, self._batch = list(lengths), batch
        self._running: list[int] = []
        self.tracker = Tracker(self.counts, lambda: self.stats, lambda: self.now)

    def step(self) -> bool:
        while self._waiting and len(self._running) < self._batch:
            self._running.append(self._waiting.pop(0))
        self.now += 0.05
        self.stats.generated_tokens += len(self._running)
        left = [tokens - 1 for tokens in self._running]
        self._running = [tokens for tokens in left if tokens]
        self.counts.done += len(left) - len(self._running)
        self.tracker.sample()
        return bool(self._running or self._waiting)

    def estimates(self) -> list[tuple[float, float]]:
        """Run to the end; return for each second (the time, the time left by the tracker)."""
        found = []
        while self.step():
            left = self.tracker.seconds_left()
            if left is not None and round(self.now / 0.05) % 20 == 0:
                found.append((self.now, left))
        return found


def uneven_lengths(count: int) -> list[int]:
    rng = random.Random(3)
    return [rng.randrange(20, 280) for _ in range(count)]


@pytest.mark.parametrize("done_before", [0, 100])
def test_time_left_is_close_to_the_truth_and_falls(done_before: int) -> None:
    work = SimulatedJob(uneven_lengths(1000), done=done_before)
    estimates = work.estimates()
    assert len(estimates) > 100
    for now, left in estimates:
        if now > 0.1 * work.now and now < 0.9 * work.now:
            assert left == pytest.approx(work.now - now, rel=0.35)
    # It may wave, but it does not grow as the old estimate did, elapsed / done * (total - done).
    quarters = [left for _, left in estimates][:: len(estimates) // 4]
    assert quarters == sorted(quarters, reverse=True)


def test_time_left_of_few_unequal_requests_is_not_that_of_the_short_ones() -> None:
    """All run at once, and the short ones finish first."""
    work = SimulatedJob([20] * 16 + [400] * 16)
    while work.counts.done < 16:
        work.step()
    for _ in range(100):
        work.step()
    left = work.tracker.seconds_left()
    assert left is not None
    assert 5 < left < 20  # in truth 14: the mean of the finished ones would say that it is over


def test_speed_is_that_of_the_last_seconds() -> None:
    stats, now, counts = EngineStats(), 0.0, Counts(300)
    tracker = Tracker(counts, lambda: stats, lambda: now)
    for _ in range(3600):  # an hour of 10 tokens a second
        now += 1
        stats.generated_tokens += 10
        tracker.sample()
    assert tracker.text() == "0 of 300 requests, 10 tok/s"
    for _ in range(20):
        now += 1
        stats.generated_tokens += 1000
        tracker.sample()
    counts.done = 3
    assert tracker.text().startswith("3 of 300 requests, 1,000 tok/s, about ")
    for _ in range(20):
        now += 1
        tracker.sample()
    assert tracker.text().startswith("3 of 300 requests, 0 tok/s")


def test_reading_prompts_is_not_shown_as_zero_tokens() -> None:
    stats, now = EngineStats(generated_tokens=50, prefill_tokens=10), 0.0
    tracker = Tracker(Counts(3), lambda: stats, lambda: now)
    now, stats.prefill_tokens = 2.0, 3010
    tracker.sample()
    assert tracker.text() == "0 of 3 requests, reading prompts at 1,500 tok/s"


def test_failed_requests_are_not_counted_as_done() -> None:
    stats, now = EngineStats(), 0.0
    counts = Counts(10, done=5, failed=2)  # of an earlier run
    tracker = Tracker(counts, lambda: stats, lambda: now)
    assert tracker.text() == "3 of 10 requests, 2 failed, 0 tok/s"
    now, stats.generated_tokens, counts.done, counts.failed = 1.0, 100, 8, 4
    tracker.sample()
    assert tracker.text() == "4 of 10 requests, 4 failed, 100 tok/s, about 2 s left"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(3.4, "3 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations_are_short(seconds: float, shown: str) -> None:
    assert job_progress._duration(seconds) == shown


def test_job_logs_its_failed_requests_and_its_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_progress, "_LINE_INTERVAL_S", 0.02)

    def slow(prompt: Sequence[int]) -> Any:
        for token in prompt:
            time.sleep(0.02)
            yield token

    run(job(tmp_path, b"4\naaaa\n\nbbbb\ncccc\n"), fake_engine(slow))
    form = r"[0-3] of 4 requests(, 1 failed)?, \d+ tok/s(, about \d+ s left)?"
    lines = [line for line in capsys.readouterr().err.splitlines() if " of 4 requests, " in line]
    assert len(lines) >= 4
    assert all(re.fullmatch(form, line) for line in lines)
    assert any("1 failed" in line and " 0 tok/s" not in line for line in lines)


def test_bar_shows_failed_requests_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(job_progress, "Console", lambda **options: console)
    monkeypatch.setattr(job_progress, "_BAR_INTERVAL_S", 0.01)
    counts, stats = Counts(9, 4, 1), EngineStats()
    with progress(counts, lambda: stats, lambda _: None):
        for _ in range(20):
            stats.generated_tokens += 100
            time.sleep(0.01)
        counts.done += 1
        time.sleep(0.05)
    assert "3 of 9 requests, 1 failed" in screen.getvalue()
    assert re.search(
        r"4 of 9 requests, 1 failed, [\d,]+ tok/s, about \d+ s left", screen.getvalue()
    )


def test_engine_counts_tokens_before_their_requests_finish() -> None:
    seen = []
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    with Engine(ROOT / "data" / "model", EngineConfig(kv_memory=32 << 20)) as engine:

        def note(token: int) -> bool:
            seen.append((engine.stats.generated_tokens, engine.stats.output_tokens))
            return False

        list(engine.generate([Request([1, 2, 3], params, on_token=note)]))
        assert engine.stats.generated_tokens == engine.stats.output_tokens == 8
    assert seen == [(count, 0) for count in range(1, 9)]
