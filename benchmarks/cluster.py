"""Measure the driver of the replicas: `python -m benchmarks.cluster --requests 200000`.

The replicas are real Ray actors, but their engines compute nothing: they return each prompt as its
own answer at once, 2,048 at a time, so that two of them stand for a whole cluster. First dispatch
alone is measured, from prepared requests to results in the journal. Then a whole job is measured:
reading, tokenizing, scheduling, sending, receiving, the journal and the result file. CPU time is
that of the driver process, all threads included, also those of Ray. Prints one JSON line.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from engine import Completion, EngineConfig, EngineStats, Request, RunSummary, SamplingParams
from getp.cluster.driver import Cluster
from getp.files import token_line
from getp.job import run as batch
from getp.job.journal import Journal
from getp.job.request_reader import RequestDefaults
from getp.report.measurements import Measurements
from getp.text.answer_text import StopWatcher
from model import load_config
from tokenizer import Tokenizer

_MODEL = Path(__file__).resolve().parent.parent / "data" / "model"


@dataclass
class NoEngine:
    """An engine without a model: answers every request with its own prompt."""

    checkpoint: str
    max_batch_size: int = 2048
    rounding: dict[str, Any] = field(default_factory=dict)
    stats: EngineStats = field(default_factory=EngineStats)

    def warm_up(self) -> None:
        """Do nothing."""

    def summary(self) -> RunSummary:
        """Return the counters; no memory is measured."""
        config = load_config(self.checkpoint)
        return RunSummary("cpu", "cpu", 1, "float32", 1, self.max_batch_size, config, self.stats, 0)

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """Return the prompt of each request as its answer."""
        for request in requests:
            if request is not None:
                ids = list(request.prompt_ids)
                self.stats.output_tokens += len(ids)
                self.stats.generated_tokens += len(ids)
                yield Completion(request.request_id, ids, "length", prompt_tokens=len(ids))


def make_engine(checkpoint: str, *_: Any, **__: Any) -> NoEngine:
    """Create an engine; the settings have no effect."""
    return NoEngine(checkpoint)


def dispatch(folder: Path, replicas: Cluster, count: int, tokens: int) -> dict[str, float]:
    """Time prepared requests from `generate` to the journal."""
    tokenizer = Tokenizer.load(_MODEL)
    requests = []
    for index in range(count):
        ids, params = [index % 1000] * tokens, SamplingParams(seed=index)
        requests.append(Request(ids, params, index, StopWatcher(tokenizer, ids, False, ())))
    measured = Measurements()
    with Journal(
        str(folder / "journal"), {"fingerprint": {}}, range(count), flush_s=1.0
    ) as journal:
        clock = _Clock()
        for done in replicas.generate(requests):
            journal.append(done.request_id, True, token_line(done.token_ids))
            measured.add(done)
        found = clock.read(count)
        assert journal.done == measured.done == count
    return found


def whole_job(folder: Path, replicas: Cluster, count: int) -> dict[str, float]:
    """Time a job from its input file to its result file."""
    source, output = folder / "input.txt", folder / "output.txt"
    with open(source, "w") as file:
        file.write(f"{count}\n")
        file.writelines(f"What is {index} plus {index % 77}?\n" for index in range(count))
    job = batch.Job(str(source), str(output), "nothing", RequestDefaults(SamplingParams(seed=1)))
    clock = _Clock()
    status = batch.run_job(job, batch.read(job), Tokenizer.load(_MODEL), replicas)
    found = clock.read(count)
    assert not status
    assert output.read_bytes().count(b"\n") == count
    return found


class _Clock:
    """Wall time and CPU time of this process since its creation."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self, count: int) -> dict[str, float]:
        """Return the time and the rates of `count` requests."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {
            "seconds": round(wall, 2),
            "requests_per_s": round(count / wall),
            "requests_per_driver_cpu_s": round(count / cpu),
            "driver_cpu_us": round(cpu * 1e6 / count, 1),
        }


def main() -> int:
    """Measure both and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=100, help="length of each prompt and answer")
    options = parser.parse_args()
    factory: Any = make_engine
    replicas = Cluster(
        _MODEL,
        _MODEL,
        EngineConfig(dtype="float32"),
        replicas=options.replicas,
        make_engine=factory,
    )
    found: dict[str, Any] = {"requests": options.requests, "replicas": options.replicas}
    with tempfile.TemporaryDirectory() as name:
        replicas.warm_up()
        found["tokens"] = options.tokens
        found["dispatch"] = dispatch(Path(name), replicas, options.requests, options.tokens)
        found["whole_job"] = whole_job(Path(name), replicas, options.requests)
    replicas.close()
    found |= {"ray": ray.__version__, "python": platform.python_version()}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
