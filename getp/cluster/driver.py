"""Replicas: many engines, over GPUs and hosts, behind the interface of one. On Ray.

The driver keeps every replica supplied and takes results as they come; a replica that dies is
started again, and what it held runs elsewhere. Where a request runs does not change its result.
"""

import pickle
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from engine import Completion, Engine, EngineConfig, EngineError, EngineStats, Request
from engine.resolve import choose_dtype, held_config
from getp import __version__, fingerprint
from getp.cluster.dispatcher import Dispatcher, linger_s, window
from getp.cluster.ray_session import Session, find_places
from getp.cluster.replica import Replica, Results, Setup, Started
from getp.errors import GetpError
from getp.terminal import say
from getp.text.answer_text import StopWatcher
from model import CheckpointError, load_config

_MOST_DEATHS = 3  # of a replica in a row, none of its requests finished in between
_WAIT_S = 0.1  # for results, until signals are looked at
_PATIENCE_S = 30.0  # until a user is told that replicas do not start

_STARTING = ("warm_up_s", "load_s", "compile_s", "capture_s")
_MEANS = ("schedule_s", "model_s", *_STARTING, "inference_s", "finish_s")
_LARGEST = ("peak_batch",)


@dataclass
class Member:
    """A replica as the driver sees it, through all its lives."""

    index: int
    life: int = 0  # how many processes it has had
    deaths: int = 0
    deaths_in_a_row: int = 0
    rerun: int = 0  # requests that it left to others
    requests: int = 0  # that it finished
    output_tokens: int = 0
    started: Started | None = None  # what it last said of itself
    ready: bool = False  # else it is being started
    stats: EngineStats = field(default_factory=EngineStats)  # of this life
    before: list[EngineStats] = field(default_factory=list)  # of earlier ones
    peak_memory: int = 0
    peak_gpu_memory: int = 0
    actor: Any = None


class Cluster:
    """Has the interface of `Engine`: warm_up, generate, finish, stats, model_config, device, dtype.

    `replicas` None: one for each `tensor_parallel` GPUs there are, or for each host. `address` is
    that of a running Ray cluster; without one, Ray is started here and stopped by `close`.
    Every replica calls `make_engine` with the checkpoint's path and the config. Raises
    UsageProblem, GetpError, CheckpointError and EngineError.
    """

    def __init__(
        self,
        checkpoint: Path,
        tokenizer: Path,
        replicas: int | None = None,
        config: EngineConfig = EngineConfig(),  # noqa: B008 - immutable
        *,
        address: str | None = None,
        make_engine: Callable[..., Engine] = Engine,
    ) -> None:
        self.model_config = load_config(checkpoint)
        self._session = Session(address)
        try:
            self.places = find_places(
                self._session.hosts(), replicas, config.device, config.tensor_parallel
            )
        except BaseException:
            self._session.close()
            raise
        self.hosts = 1
        self.device = torch.device("cuda" if self.places.gpus else "cpu")
        self.dtype = choose_dtype(config.dtype, self.model_config.dtype, self.device)
        self.tensor_parallel = config.tensor_parallel
        self.held_config = held_config(self.model_config, self.device, self.dtype)
        self.max_batch_size = 0  # of a replica, when they are warm
        self.members = [Member(index) for index in range(self.places.replicas)]
        self._setup = Setup(
            str(checkpoint.resolve()),
            str(tokenizer.resolve()),
            fingerprint.of_checkpoint(checkpoint),
            __version__,
            make_engine,
            replace(config, device=self.device.type),
        )
        self._dispatcher: Dispatcher[Request] = Dispatcher()
        self._events: queue.SimpleQueue[
            tuple[Member, int, Callable[[Member, Any], list[Completion]], Future[Any]]
        ] = queue.SimpleQueue()
        self._running = False
        self._told = 0.0  # when we last said that replicas are missing

    @property
    def stats(self) -> EngineStats:
        """What the engines of all replicas counted; seconds are means over the replicas."""
        lives = [life for member in self.members for life in (*member.before, member.stats)]
        merged = EngineStats()
        for name in (each.name for each in fields(EngineStats)):
            values = [getattr(life, name) for life in lives]
            if name in _MEANS:
                value = sum(values) / len(self.members)
            else:
                value = max(values) if name in _LARGEST else sum(values)
            setattr(merged, name, value)
        current = [member.stats for member in self.members]
        merged.kv_blocks = sum(stats.kv_blocks for stats in current)
        merged.kv_bytes = sum(stats.kv_bytes for stats in current)
        merged.peak_kv_blocks = sum(stats.peak_kv_blocks for stats in current)
        return merged

    @property
    def busy_s(self) -> list[float]:
        """Seconds that each replica had requests."""
        return [self._dispatcher.busy_s[member.index] for member in self.members]

    def warm_up(self) -> None:
        """Start all replicas and wait until their engines are warm."""
        if self._running:
            return
        self._running = True
        for member in self.members:
            self._launch(member)
        self._told = time.monotonic()
        while not all(member.ready for member in self.members):
            self._event(_WAIT_S)
        started = [member.started for member in self.members if member.started]
        self.max_batch_size = max(each.max_batch_size for each in started)
        self.hosts = len({each.host for each in started})

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Run the requests, which must have different ids; as `Engine.generate`.

        `on_token` must be a StopWatcher or None: stop strings are looked for where a request runs.
        """
        self.warm_up()
        source, more, complete = iter(requests), True, False
        check: Callable[[], None] | None = None
        try:
            while more or self._dispatcher.unfinished:
                if more:
                    wanted = self._dispatcher.wanted
                    new = list(islice(source, wanted))
                    more = len(new) == wanted
                    if new and isinstance(new[0].on_token, StopWatcher):
                        check = new[0].on_token.check
                    self._deal(new, last=not more)
                else:
                    self._deal([], last=True)
                yield from self._event(0 if more and self._dispatcher.wanted else _WAIT_S)
                if check is not None:
                    check()
            complete = True
        finally:
            if not complete:
                self._stop()

    def finish(self) -> None:
        """End the replicas. They can be warmed up again."""
        self._stop()

    def close(self) -> None:
        """End the replicas, and leave Ray: the end of the cluster."""
        self._stop()
        self._session.close()

    def _deal(self, new: list[Request], last: bool) -> None:
        pairs = [(request.request_id, request) for request in new]
        for index, dealt in self._dispatcher.deal(pairs, last, time.perf_counter()).items():
            member = self.members[index]
            chunk = pickle.dumps([_asked(request) for request in dealt])
            self._call(member, member.actor.submit.remote(chunk), _nothing)

    def _launch(self, member: Member) -> None:
        """Begin a replica's next life: a new process, which loads the model."""
        member.life += 1
        member.ready = False
        places = self.places
        options = {"num_gpus": places.gpus} if places.gpus else {}
        actor = self._session.ray.remote(Replica).options(
            num_cpus=places.cpus, max_concurrency=2, scheduling_strategy="SPREAD", **options
        )
        member.actor = actor.remote(self._setup)
        self._call(member, member.actor.start.remote(), self._started)

    def _call(
        self, member: Member, reference: Any, then: Callable[[Member, Any], list[Completion]]
    ) -> None:
        """Let what a replica answers come back as an event of this life of it."""
        life = member.life
        reference.future().add_done_callback(
            lambda future: self._events.put((member, life, then, future))
        )

    def _event(self, wait_s: float) -> list[Completion]:
        """Take the next answer of any replica, if one comes in time; return what has finished."""
        try:
            member, life, then, future = self._events.get(timeout=wait_s)
        except queue.Empty:
            self._mention_missing()
            return []
        if life != member.life:  # of a process that we have given up
            return []
        try:
            answer = future.result()
        except Exception as error:
            self._died(member, error)
            return []
        return then(member, answer)

    def _started(self, member: Member, started: Started) -> list[Completion]:
        member.started, member.ready = started, True
        self._dispatcher.join(member.index, window(started.max_batch_size))
        self._collect(member)
        return []

    def _collect(self, member: Member) -> None:
        linger = linger_s(len(self.members))
        reference = member.actor.collect.remote(linger, max(1.0, 10 * linger))
        self._call(member, reference, self._collected)

    def _collected(self, member: Member, answer: bytes) -> list[Completion]:
        results: Results = pickle.loads(answer)
        self._collect(member)
        member.stats = results.stats
        member.peak_memory = max(member.peak_memory, results.peak_memory)
        member.peak_gpu_memory = max(member.peak_gpu_memory, results.peak_gpu_memory)
        for notice in results.notices:
            say(f"getp: warning: replica {member.index}: {notice}")
        done = [completion for completion, _ in results.finished]
        ids = [completion.request_id for completion in done]
        requests = self._dispatcher.finished(member.index, ids, time.perf_counter())
        for request, (completion, trouble) in zip(requests, results.finished, strict=True):
            member.output_tokens += len(completion.token_ids)
            if trouble is not None and isinstance(request.on_token, StopWatcher):
                request.on_token.trouble = trouble
        member.requests += len(done)
        if done:
            member.deaths_in_a_row = 0
        return done

    def _died(self, member: Member, error: Exception) -> None:
        """Give a replica another life, unless it has had too many. Raises GetpError."""
        cause = getattr(error, "cause", None)
        if not member.ready and isinstance(cause, EngineError | CheckpointError | GetpError):
            raise cause  # the next start would end in the same way
        reason = _reason(cause or error)
        self._session.ray.kill(member.actor)
        lost = self._dispatcher.leave(member.index, time.perf_counter())
        member.rerun += len(lost)
        member.deaths += 1
        member.deaths_in_a_row += 1
        member.before.append(member.stats)
        member.stats = EngineStats()
        if member.deaths_in_a_row >= _MOST_DEATHS:
            held = ", ".join(map(str, lost[:8])) + (" …" if lost[8:] else "")
            raise GetpError(
                f"replica {member.index} died {member.deaths_in_a_row} times in a row, the last "
                f"time {f'with the requests {held} (counted from 0)' if lost else 'at its start'}: "
                f"{reason}"
            )
        say(
            f"getp: warning: replica {member.index} died and is started again, {len(lost)} "
            f"requests go to others: {reason}"
        )
        self._launch(member)

    def _mention_missing(self) -> None:
        missing = [str(member.index) for member in self.members if not member.ready]
        if not missing:
            self._told = time.monotonic()
        elif time.monotonic() - self._told > _PATIENCE_S:
            self._told = time.monotonic()
            say(
                f"getp: waiting for {len(missing)} of {len(self.members)} replicas to load the "
                f"model, or for room on the cluster: {', '.join(missing[:8])}"
            )

    def _stop(self) -> None:
        """End all replicas, at once."""
        for member in self.members:
            member.life += 1
            member.ready = False
            if member.actor is not None:
                self._session.ray.kill(member.actor)
                member.actor = None
        busy = self._dispatcher.busy_s
        self._dispatcher = Dispatcher()
        self._dispatcher.busy_s = busy
        self._running = False


def _reason(error: BaseException) -> str:
    """Return why a replica died, in one line: Ray says it in the middle of many."""
    text = " ".join(str(error).split())
    if "The actor is dead because " in text:
        text = text.split("The actor is dead because ")[1].split(" Some common causes")[0]
    else:
        text = f"{type(error).__name__}: {text}"
    return text[:400]


def _asked(request: Request) -> tuple[Any, ...]:
    """Return a request as `replica.ParsedBody`."""
    stops: tuple[str, ...] = ()
    chat = False
    if request.on_token is not None:
        if not isinstance(request.on_token, StopWatcher):
            raise TypeError("on_token of a request to replicas must be a StopWatcher")
        stops, chat = request.on_token.stops, request.on_token.chat
    return request.prompt_ids, request.params, request.request_id, stops, chat


def _nothing(member: Member, answer: None) -> list[Completion]:
    return []
