"""The order in which waiting requests run affects only the run time, not the results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import Engine, EngineConfig, SamplingParams
from getp.job import run as job_run
from getp.job.formats.interface import Failure, JobRequest
from getp.job.ordering import order_for_throughput
from getp.job.prefetch import Prefetcher
from getp.job.request_reader import RequestDefaults
from tests.getp.helpers import FakeEngine, small_tokenizer

TOKENIZER = small_tokenizer()


def request(index: int, prompt: list[int], **limits: int) -> JobRequest:
    return JobRequest(index, index, f"request-{index}", prompt, SamplingParams(**limits))  # type: ignore[arg-type]


def order(requests: list[JobRequest | Failure]) -> list[int]:
    return [each.index for each in order_for_throughput(requests)]


def test_prompts_with_a_common_prefix_are_grouped_and_long_answers_start_first() -> None:
    a, b = [1] * 20, [2] * 20
    requests: list[JobRequest | Failure] = [
        request(0, [*a, 7], max_new_tokens=9),
        request(1, [*b, 5], max_new_tokens=10),
        request(2, [*a, 3], max_new_tokens=4),
        request(3, [*b, 4], max_new_tokens=1),
        request(4, [9], max_new_tokens=500),
        request(5, [8], max_positions=300),
        Failure(6, 6, None, "empty_prompt", "the prompt is empty"),
        request(7, [3]),
    ]
    assert order(requests) == [6, 7, 4, 5, 3, 1, 2, 0]
    assert order([]) == []


def test_windows_are_filled_before_they_are_arranged_and_no_item_is_lost() -> None:
    windows: list[int] = []

    def arrange(items: list[int]) -> list[int]:
        windows.append(len(items))
        return sorted(items, reverse=True)

    with Prefetcher(iter(range(25)), lambda item: 1, 10, arrange) as prefetcher:
        taken = list(prefetcher.until(lambda: False))
    assert windows == [10, 10, 5]
    assert taken == [*range(9, -1, -1), *range(19, 9, -1), *range(24, 19, -1)]


def run(folder: Path, schedule: Any, engine: Any, lines: list[str]) -> bytes:
    folder.mkdir()
    (folder / "input.txt").write_text("\n".join([str(len(lines)), *lines]) + "\n")
    job = job_run.Job(
        input=str(folder / "input.txt"),
        output=str(folder / "output.txt"),
        checkpoint="small",
        defaults=RequestDefaults(
            SamplingParams(max_positions=200, max_new_tokens=8, ignore_eos=True)
        ),
        schedule=schedule,
    )
    assert job_run.run_job(job, job_run.read(job), TOKENIZER, engine) == 0
    return (folder / "output.txt").read_bytes()


def interleaved() -> list[str]:
    heads = ("The quick brown fox asks this: " * 3, "A completely different head of prompts " * 3)
    return [f"{heads[index % 2]}{index}?" for index in range(24)]


def test_grouping_interleaved_prompts_raises_hits_of_a_small_prefix_cache(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    cached, results = {}, {}
    for schedule in ("first", "throughput"):
        probe = Engine(checkpoint("qwen2"), EngineConfig(dtype="float32", max_batch_size=2))
        block = probe.runner.block_bytes(16)
        engine = Engine(
            checkpoint("qwen2"),
            EngineConfig(dtype="float32", max_batch_size=1, kv_memory=9 * block),
        )
        results[schedule] = run(tmp_path / schedule, schedule, engine, interleaved())
        cached[schedule] = engine.stats.cached_tokens
    assert results["first"] == results["throughput"]
    assert cached["throughput"] > 22 * 48  # all but the first prompt of each group
    assert cached["throughput"] > 2 * cached["first"]


def test_schedule_first_runs_in_input_order(tmp_path: Path) -> None:
    ran = {}
    for schedule in ("first", "throughput"):
        engine = FakeEngine(batch=1)
        run(tmp_path / schedule, schedule, engine, interleaved())
        ran[schedule] = [request.request_id for request in engine.requests]
    assert ran["first"] == list(range(24))
    assert [index % 2 for index in ran["throughput"]] == [0] * 12 + [1] * 12
