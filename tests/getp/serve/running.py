"""A server in a thread of the test's process, with the embedded model."""

import signal
import socket
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai

from engine import Engine, EngineConfig, SamplingParams
from getp.checkpoints import embedded_model, load_tokenizer
from getp.job.job import Job
from getp.job.request_reader import RequestDefaults
from getp.job.signals import GracefulStop
from getp.serve.config import ServeConfig
from getp.serve.server import serve

MODEL = "embedded"
QUESTION = "What is 17 plus 25?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def wait_until(condition: Any, seconds: float = 60) -> None:
    """Wait for a condition; the time is for a machine that does many other things."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)


class RunningServer:
    """A server, from its construction to `stop`."""

    def __init__(
        self,
        data: Path | None = None,
        engine: Any = None,
        model: Path | None = None,
        **config: Any,
    ) -> None:
        model = model or embedded_model()
        tokenizer = load_tokenizer(model)
        self.engine = engine or Engine(model, EngineConfig(device="cpu", max_batch_size=16))
        self.engine.tokenizer_json = tokenizer.to_json
        params = SamplingParams(seed=1, stop_ids=tokenizer.stop_ids)
        job = Job("", "", MODEL, RequestDefaults(params, {}))
        self.port = free_port()
        self.stopper = GracefulStop(10)
        self.config = ServeConfig("127.0.0.1", self.port, MODEL, job, data=data, **config)
        self.status: Any = None
        self._thread = threading.Thread(target=self._run, args=(tokenizer,), daemon=True)
        self._thread.start()
        wait_until(self._answers)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return str(response.read().decode())

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics").splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def metric(self, name: str) -> float:
        return self.metrics()[name]

    def stop(self) -> Any:
        """Do what a signal does; return the exit status or the error."""
        self.stopper._deadline = time.monotonic() + 10
        self.stopper.signal = signal.SIGTERM
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.status

    def _run(self, tokenizer: Any) -> None:
        try:
            self.status = serve(self.config, self.engine, tokenizer, self.stopper)
        except BaseException as error:
            self.status = error

    def _answers(self) -> bool:
        assert self.status is None, self.status
        try:
            return bool(self.get("/health"))
        except OSError:
            return False
