"""A long job without a model: `python -m benchmarks.soak --requests 1000000`.

Everything but the model is real: the input is scanned, streamed and tokenized in advance; requests
are ordered, answered, rendered and written to the journal; then the result file is written. Prints,
as time passes, finished requests, the rate since the last line and the resident memory; then one
JSON line. The rate should not drift and memory should not grow: the memory for each request (its
journal offset and the hash of its id) is allocated at the start.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from engine import Completion, Engine, EngineStats, Request, RunSummary, SamplingParams
from engine.resolve import dtype_name
from engine.summary import peak_resident_bytes
from getp.job import run as batch
from getp.job.request_reader import RequestDefaults
from model.cost.known_models import named_config
from tokenizer import Tokenizer

_BATCH = 256  # requests that run at once, as in an engine


@dataclass
class Sample:
    """Measurements at one moment."""

    seconds: float
    requests: int
    rate: float  # since the previous sample
    cpu_us: float  # CPU time per request since then, which other processes do not affect
    rss_mib: float


@dataclass
class IdleEngine:
    """An engine that answers every request with its own prompt, and records samples."""

    every: int
    samples: list[Sample] = field(default_factory=list)
    stats: EngineStats = field(default_factory=EngineStats)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    max_batch_size: int = _BATCH
    rounding: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Set a config, which reports need."""
        self.model_config = replace(named_config("qwen2-0.5b"), stop_ids=frozenset())

    def warm_up(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield the completions of each batch in reverse order."""
        waiting, done = iter(requests), 0
        started = last = time.perf_counter()
        last_cpu = time.process_time()
        while batch_requests := list(islice(waiting, _BATCH)):
            now = time.perf_counter()
            for request in reversed(batch_requests):
                yield Completion(
                    request.request_id,
                    list(request.prompt_ids),
                    "length",
                    prompt_tokens=len(request.prompt_ids),
                    arrived=now,
                    first_token=now,
                    finished=now,
                )
            self.stats.steps += 1
            self.stats.batch_sum += len(batch_requests)
            self.stats.output_tokens += sum(len(request.prompt_ids) for request in batch_requests)
            self.stats.generated_tokens = self.stats.output_tokens
            before, done = done, done + len(batch_requests)
            if done // self.every > before // self.every:
                now, cpu = time.perf_counter(), time.process_time()
                rate, cpu_us = self.every / (now - last), (cpu - last_cpu) * 1e6 / self.every
                self._note(Sample(now - started, done, rate, cpu_us, _resident_mib()))
                last, last_cpu = now, cpu

    def summary(self) -> RunSummary:
        """Return the summary of the run."""
        return RunSummary(
            device="cpu",
            device_type="cpu",
            device_count=1,
            dtype=dtype_name(self.dtype),
            tensor_parallel=1,
            max_batch_size=self.max_batch_size,
            config=self.model_config,
            stats=self.stats,
            peak_memory_bytes=peak_resident_bytes(),
        )

    def _note(self, sample: Sample) -> None:
        self.samples.append(sample)
        print(
            f"{sample.seconds:8.1f} s {sample.requests:12,} requests {sample.rate:10,.0f} /s "
            f"{sample.cpu_us:7.1f} us CPU each {sample.rss_mib:8.1f} MiB",
            flush=True,
        )


def main() -> int:
    """Write the input, run the job, check the length of the result and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--schedule", choices=["throughput", "first"], default="throughput")
    parser.add_argument("--form", choices=["tokens", "jsonl"], default="tokens")
    parser.add_argument("--folder", type=Path, help="working folder  [default: a temporary one]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        found = soak(Path(name), options.requests, options.schedule, options.form)
    print(json.dumps(found))
    return 0


def soak(folder: Path, requests: int, schedule: Any, form: str) -> dict[str, Any]:
    """Run the job in a folder and return its figures."""
    source = folder / "input.jsonl"
    with open(source, "w") as file:
        for index in range(requests):
            file.write(json.dumps({"id": f"r{index}", "prompt": f"What is {index} + 7?"}) + "\n")
    output = folder / ("output.txt" if form == "tokens" else "output.jsonl")
    job = batch.Job(
        input=str(source),
        output=str(output),
        checkpoint="nothing",
        defaults=RequestDefaults(SamplingParams(seed=1)),
        schedule=schedule,
    )
    engine = IdleEngine(max(1, requests // 20))
    started = time.perf_counter()
    status = batch.run_job(job, batch.read(job), _tokenizer(), cast(Engine, engine))
    seconds = time.perf_counter() - started
    with open(output, "rb") as results:
        lines = sum(1 for _ in results)
    if status or lines != requests:
        raise SystemExit(f"status {status}, {lines} lines of {requests}")
    cpu = [sample.cpu_us for sample in engine.samples]
    memory = [sample.rss_mib for sample in engine.samples]
    half = len(cpu) // 2
    return {
        "requests": requests,
        "seconds": round(seconds, 1),
        "requests_per_s": round(requests / seconds),
        "cpu_us_first_half": round(sum(cpu[:half]) / max(1, half), 1),
        "cpu_us_second_half": round(sum(cpu[half:]) / max(1, len(cpu) - half), 1),
        "rss_mib_first": round(memory[0], 1),
        "rss_mib_last": round(memory[-1], 1),
        "rss_mib_most": round(max(memory), 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
    }


def _tokenizer() -> Tokenizer:
    """A tokenizer with one token for each byte, which needs no file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)


def _resident_mib() -> float:
    """Return the resident memory in MiB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


if __name__ == "__main__":
    sys.exit(main())
