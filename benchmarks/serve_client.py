"""A server process, and a small HTTP client whose own work is little, for the server benchmarks."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class ServerProcess:
    """A server of this repository, from its construction to `stop`."""

    def __init__(self, checkpoint: str | None, data: Path, port: int, *args: str) -> None:
        given = [] if checkpoint is None else [checkpoint]
        command = [sys.executable, "run.py", *given, "-m", "serve", "--port", str(port)]
        command += ["--data", str(data), *args]
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "serving" in line:
                return
        raise RuntimeError(f"the server ended with status {self._process.wait()}")

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def call(self, path: str, body: Any = None) -> Any:
        """Return the JSON answer of a GET request, or of a POST request with this body."""
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(self.url + path, data, timeout=60) as response:
            return json.loads(response.read())

    def metrics(self) -> dict[str, float]:
        """Return the metrics, by name."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def upload(self, data: bytes) -> str:
        """Store the input of a batch; returns its id."""
        parts = {"purpose": b"batch", "file": data}
        body = b"".join(
            b'--x\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
            % (name.encode(), b'; filename="in.jsonl"' if name == "file" else b"", part)
            for name, part in parts.items()
        )
        head = {"content-type": "multipart/form-data; boundary=x"}
        request = urllib.request.Request(self.url + "/v1/files", body + b"--x--\r\n", head)
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(json.loads(response.read())["id"])

    def batch(self, file_id: str, endpoint: str) -> str:
        """Start a batch; returns its id."""
        body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h"}
        return str(self.call("/v1/batches", body)["id"])

    def stop(self) -> int:
        """End the server; returns its exit status."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(60)
        finally:
            self._process.kill()


@dataclass
class Answer:
    """When the parts of a streamed answer arrived, in seconds after the request was due."""

    first: float | None = None
    last: float = 0.0
    chunks: int = 0
    status: int = 0
    times: list[float] = field(default_factory=list)


async def stream(port: int, body: dict[str, Any], due: float, path: str) -> Answer:
    """Send a streamed request to this port; due: seconds of time.perf_counter."""
    answer = Answer()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps({**body, "stream": True}).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        answer.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith(b"data: ") and _has_text(line):
                answer.last = time.perf_counter() - due
                answer.first = answer.last if answer.first is None else answer.first
                answer.chunks += 1
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    return answer


def _has_text(line: bytes) -> bool:
    """Return whether a chunk adds text, not only a role or the end."""
    choices = json.loads(line[6:]).get("choices") or [{}]
    delta = choices[0].get("delta", choices[0])
    return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("text"))


async def open_loop(
    port: int, bodies: Sequence[dict[str, Any]], gaps: Sequence[float], path: str
) -> list[Answer]:
    """Send each request after its gap, whether or not earlier ones are answered."""
    tasks, due = [], time.perf_counter()
    for body, gap in zip(bodies, gaps, strict=True):
        due += gap
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(stream(port, body, due, path)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(
    port: int, bodies: Sequence[dict[str, Any]], clients: int, path: str
) -> list[Answer]:
    """Let each of several clients send its next request when its last one is answered."""
    left, found = list(reversed(bodies)), list[Answer]()

    async def client() -> None:
        while left:
            found.append(await stream(port, left.pop(), time.perf_counter(), path))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


def resident_bytes(pid: int) -> int:
    """Return the memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def thread_count(pid: int) -> int:
    """Return the number of threads of a process."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
