"""Send a server many requests, polite and not: `python benchmarks/serve_stress.py`.

Clients ask and read the answer, hang up at any moment, give up after a short time, or send bodies
that are not valid. Every polite request must get its own answer exactly once, every invalid one an
error, and at the end no sequence, block, thread or memory may be left. Prints one JSON object.
"""

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import click

from benchmarks.serve_client import ServerProcess, resident_bytes, thread_count

_PATH = "/v1/completions"
_KINDS = ["ask", "ask", "stream", "stream", "hang up", "give up", "bad body", "bad request"]
_INVALID: list[Any] = [
    {"prompt": 7},
    {"prompt": "1", "n": -1},
    {"prompt": "1", "temperature": "hot"},
    {"messages": []},
    [],
    {"prompt": "1 " * 2000},
    {"prompt": "1", "unknown": 1},
]


async def stress(port: int, requests: int, clients: int, seed: int = 0) -> Counter[str]:
    """Send the requests; returns how many of each kind there were. Raises AssertionError."""
    numbers, done = iter(range(requests)), Counter[str]()
    expected: dict[str, str] = {}

    async def client(number: int) -> None:
        chance = random.Random(seed + number)
        for _ in numbers:
            kind = chance.choice(_KINDS)
            await asyncio.wait_for(_send(port, kind, chance, expected), 300)
            done[kind] += 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    return done


async def _send(port: int, kind: str, chance: random.Random, expected: dict[str, str]) -> None:
    """Send one request of this kind, and check what comes back."""
    question = f"What is {chance.randrange(50)} plus {chance.randrange(50)}?"
    body: Any = {"prompt": question, "temperature": 0}
    if kind in ("hang up", "give up"):
        body |= {"max_tokens": 400, "ignore_eos": True, "n": chance.randint(1, 4)}
    body |= {"stream": kind == "stream" or chance.random() < 0.5} if kind != "ask" else {}
    if kind == "bad request":
        body = chance.choice(_INVALID)
    data = json.dumps(body).encode()
    if kind == "bad body":
        data = data[: chance.randrange(len(data) - 1)]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST {_PATH} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        if kind == "hang up":
            await reader.read(chance.randrange(1, 2000))
        elif kind == "give up":
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(), chance.random() * 0.2)
        else:
            _check(kind, await reader.read(), question, expected)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _check(kind: str, received: bytes, question: str, expected: dict[str, str]) -> None:
    """Raise AssertionError unless this is the one answer to the question, or an error."""
    head, content = received.split(b"\r\n\r\n", 1)
    status = int(head.split()[1])
    if kind.startswith("bad"):
        assert status in (400, 404), received[:500]
        assert json.loads(content)["error"]["message"]
        return
    assert status == 200, received[:500]
    if kind == "ask":
        (choice,) = json.loads(content)["choices"]
        text = choice["text"]
    else:
        events = [part[6:] for part in content.split(b"\n") if part.startswith(b"data: ")]
        assert events[-1].strip() == b"[DONE]", received[-500:]
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    # The same whatever else was in the batch.
    assert expected.setdefault(question, text) == text, (question, text)


def left_over(server: Any) -> dict[str, float]:
    """Return what should be zero when every client has gone; waits for the last ones to be."""
    names = ("online_requests", "running", "waiting", "kv_blocks_used")
    deadline = time.monotonic() + 60
    while True:
        metrics = server.metrics()
        found = {name: metrics[f"getp_{name}"] for name in names}
        if not any(found.values()) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


@click.command()
@click.option("--port", default=8766, show_default=True)
@click.option("--requests", default=10_000, show_default=True)
@click.option("--clients", default=64, show_default=True)
def main(port: int, requests: int, clients: int) -> None:
    """Send the requests to a server with the embedded model."""
    with tempfile.TemporaryDirectory() as folder:
        # All pages of a small KV cache are in memory before it is measured.
        server = ServerProcess(None, Path(folder), port, "--kv-memory", "8MiB")
        try:
            asyncio.run(stress(port, max(clients, requests // 10), clients))
            left_over(server)
            before = resident_bytes(server.pid), thread_count(server.pid)
            start = time.perf_counter()
            done = asyncio.run(stress(port, requests, clients, seed=1000))
            seconds = time.perf_counter() - start
            left = left_over(server)
            after = resident_bytes(server.pid), thread_count(server.pid)
            status = server.stop()
        except BaseException:
            server.stop()
            raise
    found = {
        "requests": sum(done.values()),
        "kinds": dict(done),
        "seconds": round(seconds, 1),
        "left": left,
        "memory_mib": [round(bytes_ / 2**20, 1) for bytes_ in (before[0], after[0])],
        "threads": [before[1], after[1]],
        "exit_status": status,
    }
    print(json.dumps(found))
    assert not any(left.values())
    assert after[1] <= before[1]
    assert status == 0


if __name__ == "__main__":
    main()
