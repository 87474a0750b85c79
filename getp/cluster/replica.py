"""One replica: an engine in a process of its own, fed in chunks. Knows nothing of Ray."""

import os
import pickle
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine import Completion, Engine, EngineConfig, EngineStats, Request, SamplingParams
from getp import __version__, fingerprint
from getp.errors import GetpError
from getp.report.job_report import peak_memory
from getp.text.answer_text import StopWatcher
from tokenizer import Tokenizer

ParsedBody = tuple[list[int], SamplingParams, int, tuple[str, ...], bool]
"""A request on its way: prompt ids, parameters, id, stop strings, whether it is a chat."""


@dataclass(frozen=True)
class Setup:
    """What every replica is told. Paths are those of its own host."""

    checkpoint: str
    tokenizer: str
    identity: str  # fingerprint of the checkpoint, as the driver has it
    version: str  # of getp, as the driver has it
    make_engine: Callable[..., Engine]
    config: EngineConfig


@dataclass(frozen=True)
class Started:
    """What a replica says of itself when its engine is warm."""

    host: str
    pid: int
    device: str
    max_batch_size: int


@dataclass(frozen=True)
class Results:
    """What has finished, each with what went wrong with its text, and how the replica is."""

    finished: list[tuple[Completion, str | None]]
    stats: EngineStats
    notices: list[str]
    peak_memory: int
    peak_gpu_memory: int


class Replica:
    """Runs what is submitted and gives results out as they are collected.

    The engine has a thread; `submit` and `collect` may be called from any others. Requests and
    results travel pickled: a chunk at a time, which costs the driver little.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._changed = threading.Condition()
        self._inbox: deque[Request] = deque()
        self._held = 0  # requests inside the engine
        self._watchers: dict[int, StopWatcher] = {}  # of requests with stop strings
        self._finished: list[tuple[Completion, str | None]] = []
        self._notices: list[str] = []
        self._error: BaseException | None = None
        self._engine: Engine
        self._tokenizer: Tokenizer | None = None

    def start(self) -> Started:
        """Make the engine and warm it up. Raises what the engine raises, and GetpError."""
        setup, host = self._setup, socket.gethostname()
        if setup.version != __version__:
            raise GetpError(f"host {host} has getp {__version__}, the driver {setup.version}")
        if not Path(setup.checkpoint).is_dir():
            raise GetpError(f"host {host} has no {setup.checkpoint}: every host needs it there")
        if fingerprint.of_checkpoint(Path(setup.checkpoint)) != setup.identity:
            raise GetpError(f"{setup.checkpoint} on host {host} is not the driver's checkpoint")
        self._engine = setup.make_engine(
            setup.checkpoint, setup.config, notice=self._notices.append
        )
        self._engine.warm_up()
        threading.Thread(target=self._work, daemon=True).start()
        device = self._engine.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return Started(host, os.getpid(), name, self._engine.max_batch_size)

    def submit(self, chunk: bytes) -> None:
        """Take a pickled list of `ParsedBody`."""
        asked: list[ParsedBody] = pickle.loads(chunk)
        requests = [self._request(*each) for each in asked]
        with self._changed:
            self._inbox.extend(requests)
            self._changed.notify_all()

    def collect(self, linger_s: float, most_s: float) -> bytes:
        """Return pickled `Results`: `linger_s` after the first has come, or after `most_s`.

        Raises what has ended the engine.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._finished or self._error, timeout=most_s)
        if self._error is None:
            time.sleep(linger_s)
        with self._changed:
            finished, self._finished = self._finished, []
        if self._error is not None and not finished:
            raise self._error
        notices, self._notices[:] = list(self._notices), []
        on_gpu = self._engine.device.type == "cuda"
        gpu = torch.cuda.max_memory_allocated(self._engine.device) if on_gpu else 0
        return pickle.dumps(Results(finished, self._engine.stats, notices, peak_memory(), gpu))

    def _request(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        request_id: int,
        stops: tuple[str, ...],
        chat: bool,
    ) -> Request:
        if not stops:
            return Request(prompt_ids, params, request_id)
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self._setup.tokenizer)
        watcher = StopWatcher(self._tokenizer, prompt_ids, chat, stops)
        self._watchers[request_id] = watcher
        return Request(prompt_ids, params, request_id, watcher)

    def _requests(self) -> Iterator[Request | None]:
        """Give the engine what is there; an idle engine waits for more."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._inbox or self._held)
                request = self._inbox.popleft() if self._inbox else None
                self._held += request is not None
            yield request

    def _work(self) -> None:
        try:
            for completion in self._engine.generate(self._requests()):
                watcher = self._watchers.pop(completion.request_id, None)
                trouble = None if watcher is None else watcher.trouble
                with self._changed:
                    self._held -= 1
                    self._finished.append((completion, trouble))
                    self._changed.notify_all()
        except BaseException as error:  # whoever collects next learns it
            with self._changed:
                self._error = error
                self._changed.notify_all()
