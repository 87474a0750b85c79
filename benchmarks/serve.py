"""Time a server: `python benchmarks/serve.py CHECKPOINT` or `--peer PORT` for another engine's.

Without options: time to first token of single requests that arrive at random (open loop), with and
without a batch that fills the engine, then the throughput of a batch and of `-m getp` on the same
file, in alternation. With `--clients`: the same requests from 1, 8, 32 clients (closed loop), for
this server or, with `--peer`, for a running server with OpenAI's API. Prints one JSON object.
"""

import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import click

from benchmarks.serve_client import ROOT, Answer, ServerProcess, closed_loop, open_loop

_WORDS = (
    "the lamp is lit sea calm boats home every evening keeper wrote same words north wind".split()
)
_PATH = "/v1/completions"


def _prompt(words: int, seed: int) -> str:
    """Return a prompt of about as many tokens, unlike any other."""
    return " ".join(random.Random(seed).choices(_WORDS, k=words))


def _body(words: int, tokens: int, seed: int) -> dict[str, Any]:
    fixed = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    return {"prompt": _prompt(words, seed), **fixed}


def _times(answers: list[Answer]) -> dict[str, float]:
    """Return the quantiles of the time to first token, in milliseconds."""
    first = sorted(1e3 * answer.first for answer in answers if answer.first is not None)
    assert len(first) == len(answers), "a request was not answered"
    found = {
        "requests": len(first),
        "ttft_median_ms": round(statistics.median(first), 1),
        "ttft_p99_ms": round(first[min(len(first) - 1, int(0.99 * len(first)))], 1),
        "ttft_max_ms": round(first[-1], 1),
    }
    click.echo(json.dumps(found), err=True)
    return found


def _latency(server: ServerProcess, rate: float, seconds: float, shape: tuple[int, int]) -> Any:
    """Return times to first token of requests that arrive at this rate per second."""
    chance = random.Random(1)
    gaps: list[float] = []
    while sum(gaps) < seconds:
        gaps.append(chance.expovariate(rate))
    bodies = [_body(*shape, seed) for seed in range(len(gaps))]
    return _times(asyncio.run(open_loop(server.port, bodies, gaps, _PATH)))


def _batch_file(requests: int, shape: tuple[int, int], seed: int) -> bytes:
    records = (
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": _PATH,
            "body": _body(*shape, 1000 + seed + number),
        }
        for number in range(requests)
    )
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _batch_speed(server: ServerProcess, data: bytes, tokens: int) -> float:
    """Return the output tokens per second of a batch with as many tokens."""
    file_id = server.upload(data)
    steps = server.metrics()["getp_steps_total"]
    batch = server.batch(file_id, _PATH)
    start = None
    while server.call(f"/v1/batches/{batch}")["status"] != "completed":
        if start is None and server.metrics()["getp_steps_total"] > steps:
            start = time.perf_counter()
        time.sleep(0.02 if start is None else 0.2)  # each question takes time from the engine
    assert start is not None
    return tokens / (time.perf_counter() - start)


def _job_speed(checkpoint: str | None, file: Path) -> float:
    """Return the output tokens per second that `-m getp` reports."""
    given = [] if checkpoint is None else [checkpoint]
    output = str(file.with_name("out.jsonl"))
    command = [sys.executable, "run.py", *given, "-m", "getp", "-i", str(file), "-o", output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.rsplit("(tok/s):", 1)[1])


def _interference(
    server: ServerProcess, rate: float, seconds: float, batch_requests: int
) -> dict[str, Any]:
    """Return times to first token with and without a batch that fills the engine."""
    shape = 64, 16
    _latency(server, rate, 2, shape)
    alone = _latency(server, rate, seconds, shape)
    batch = server.batch(server.upload(_batch_file(batch_requests, (128, 256), 0)), _PATH)
    while server.metrics()["getp_running"] < 8:
        time.sleep(0.05)
    time.sleep(2)
    tokens, start = server.metrics()["getp_output_tokens_total"], time.perf_counter()
    beside = _latency(server, rate, seconds, shape)
    speed = (server.metrics()["getp_output_tokens_total"] - tokens) / (time.perf_counter() - start)
    status = server.call(f"/v1/batches/{batch}")["status"]
    server.call(f"/v1/batches/{batch}/cancel", {})
    while server.call(f"/v1/batches/{batch}")["status"] != "cancelled":
        time.sleep(0.05)
    assert status == "in_progress", "the batch ended before the requests: use more of them"
    return {"alone": alone, "beside_batch": beside, "tok_s_of_both": round(speed, 1)}


def _throughput(server: ServerProcess, checkpoint: str | None, runs: int, requests: int) -> Any:
    """Return the throughput of a batch and of a plain job with the same file, in alternation."""
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs):
            data, file = (
                _batch_file(requests, (128, 128), 5000 * (run + 1)),
                Path(folder, "in.jsonl"),
            )
            file.write_bytes(data)
            batch = _batch_speed(server, data, 128 * requests)
            pairs.append((round(batch, 1), round(_job_speed(checkpoint, file), 1)))
            click.echo(json.dumps(pairs[-1]), err=True)
    ratio = statistics.median(batch / job for batch, job in pairs)
    return {"batch_and_job_tok_s": pairs, "median_ratio": round(ratio, 3)}


def _clients(port: int, counts: list[int], requests: int, model: str | None) -> dict[str, Any]:
    """Return output tokens per second and times to first token, by the number of clients."""
    found = {}
    extra = {} if model is None else {"model": model}
    for count in counts:
        number = max(2, min(requests, 4 * count))
        bodies = [{**_body(64, 64, 100 * count + seed), **extra} for seed in range(number)]
        start = time.perf_counter()
        answers = asyncio.run(closed_loop(port, bodies, count, _PATH))
        seconds = time.perf_counter() - start
        assert all(each.chunks > 32 for each in answers), "answers are shorter than asked for"
        found[str(count)] = {"tok_s": round(64 * len(bodies) / seconds, 1), **_times(answers)}
    return found


@click.command()
@click.argument("checkpoint", required=False)
@click.option("--port", default=8765, show_default=True)
@click.option("--rate", default=2.0, show_default=True, help="Single requests per second.")
@click.option(
    "--seconds", default=15.0, show_default=True, help="Time of each open-loop load; 0: none."
)
@click.option("--requests", default=64, show_default=True, help="Requests of each batch.")
@click.option("--runs", default=2, show_default=True, help="Pairs of batch and job; 0: none.")
@click.option("--clients", multiple=True, type=int, help="Closed loop with so many clients.")
@click.option("--peer", type=int, help="Port of another engine's running server.")
@click.option("--model", help="Name of the model for --peer.")
def main(checkpoint: str | None, port: int, rate: float, seconds: float, **rest: Any) -> None:
    """Time a server with CHECKPOINT (default: the embedded model)."""
    counts, requests = list(rest["clients"]), rest["requests"]
    if rest["peer"] is not None:
        found: dict[str, Any] = _clients(rest["peer"], counts, requests, rest["model"])
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(checkpoint, Path(folder), port)
        try:
            if counts:
                found = _clients(port, counts, requests, None)
            else:
                found = _interference(server, rate, seconds, 2000) if seconds else {}
                found |= _throughput(server, checkpoint, rest["runs"], requests)
        finally:
            server.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
