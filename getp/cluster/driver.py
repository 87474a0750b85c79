"""The driver of the replicas: many engines on GPUs and hosts, behind the interface of one engine.

It keeps every replica supplied with requests and yields results as they arrive. A replica that dies
is restarted, and its requests run elsewhere; results do not depend on the replica.
"""

import pickle
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from engine import Completion, Engine, EngineConfig, EngineError, EngineStats, Request, RunSummary
from engine.request import numbered
from engine.resolve import (
    KERNEL_CHOICES,
    choose_dtype,
    dtype_name,
    held_config,
    load_model_config,
)
from engine.scheduling.admission import take_requests
from engine.summary import peak_resident_bytes
from getp import __version__, fingerprint
from getp.cluster.dispatcher import Dispatcher, collect_delay_s, max_in_flight
from getp.cluster.ray_session import RaySession, death_reason
from getp.cluster.replica import (
    Replica,
    ReplicaSetup,
    Results,
    StartReport,
    StreamedToken,
    request_message,
)
from getp.cluster.replica_state import Event, Handler, ReplicaState, merged_stats, missing_notice
from getp.errors import GetpError
from getp.rounding import check_replica
from getp.terminal import print_message, warn
from getp.text.answer_text import StopWatcher
from model import CheckpointError
from model.cost.workload import kv_dtype

_MAX_DEATHS = 3  # deaths of a replica in a row, without a finished request in between
_SOURCE_POLL_S = 0.005  # between two questions to a source that had no request
_POLL_S = 0.1  # longest wait for results before signals are handled
_SLOW_START_S = 30.0  # time without a start after which a message names the missing replicas


class Cluster:
    """Has the interface of `Engine`: warm_up, generate, finish, summary, stats, device, dtype, ….

    Every replica calls `make_engine` with the path of the checkpoint and the config. replicas: None
    means one per `config.tensor_parallel` GPUs, or one per host without GPUs. address: of a running
    Ray cluster; None: start Ray here, and stop it in `close`. accept_different_rounding: let
    replicas round differently in 16 bits, too. Raises UsageProblem, GetpError,
    CheckpointError and EngineError.
    """

    def __init__(
        self,
        checkpoint: Path,
        tokenizer: Path,
        config: EngineConfig = EngineConfig(),  # noqa: B008 - immutable
        *,
        replicas: int | None = None,
        address: str | None = None,
        accept_different_rounding: bool = False,
        make_engine: Callable[..., Engine] = Engine,
    ) -> None:
        self.config = config
        self.model_config = load_model_config(checkpoint, config)
        self._session = RaySession(address)
        self.resources = self._session.plan(replicas, config.device, config.tensor_parallel)
        self.device = torch.device("cuda" if self.resources.gpus else "cpu")
        self.dtype = choose_dtype(config.dtype, self.model_config.dtype, self.device)
        self.tensor_parallel = config.tensor_parallel
        self.held_config = held_config(self.model_config, self.device, self.dtype)
        self.max_batch_size = 0  # per replica; known after `warm_up`, as the next one
        self.max_positions = self.model_config.max_positions
        self.replicas = [ReplicaState(index) for index in range(self.resources.replicas)]
        self._setup = ReplicaSetup(
            str(checkpoint.resolve()),
            str(tokenizer.resolve()),
            fingerprint.of_checkpoint(checkpoint),
            __version__,
            make_engine,
            replace(config, device=self.device.type),
        )
        self._dispatcher = Dispatcher(_share_prompt)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._accept_different_rounding = accept_different_rounding
        self._kernel_request: tuple[Mapping[str, Any] | None, float | None] = None, None
        self._running = False
        self._inference_s = 0.0  # in `generate`
        self._cancelled: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._streamed: dict[int, int] = {}  # tokens passed on, by request
        self._last_notice = 0.0  # time of the last message on missing replicas

    @property
    def kv_dtype(self) -> str:
        """Return the dtype of the replicas' KV caches."""
        return kv_dtype(self.model_config, dtype_name(self.dtype))

    @property
    def stats(self) -> EngineStats:
        """Return the counters of all replicas together; seconds are means over the replicas."""
        return merged_stats(self.replicas)

    def choose_kernels(self, preferred: Mapping[str, Any] | None, expected_s: float | None) -> None:
        """Let the first replica choose the kernels of all; call it before reading `rounding`."""
        self._kernel_request = preferred, expected_s

    @cached_property
    def rounding(self) -> Mapping[str, Any]:
        """Return the rounding of the first replica; the processes of all are started for it."""
        for replica in self.replicas:
            self._start_process(replica)
        self._last_notice = time.monotonic()
        answer = self.replicas[0].actor.rounding.remote(*self._kernel_request)
        return cast(Mapping[str, Any], self._session.result(answer, self._report_missing))

    def summary(self) -> RunSummary:
        """Return the data of the runs so far for a report; also valid after `finish`."""
        resources = self.resources
        started = [replica.started for replica in self.replicas if replica.started]
        hosts = len({each.host for each in started}) or 1
        device = started[0].device if started else self.device.type
        where = f"{hosts} hosts" if hosts > 1 else "one host"
        busy_s = self._dispatcher.busy_s
        return RunSummary(
            device=f"{len(self.replicas)} replicas on {where}, {device} each",
            device_type="cuda" if resources.gpus else "cpu",
            device_count=resources.replicas * resources.gpus or hosts,
            dtype=dtype_name(self.dtype),
            tensor_parallel=self.tensor_parallel,
            max_batch_size=self.max_batch_size,
            config=self.held_config,
            stats=self.stats,
            peak_memory_bytes=peak_resident_bytes(),
            peak_gpu_memory_bytes=max(each.peak_gpu_memory for each in self.replicas) or None,
            replicas=tuple(
                each.summary(busy_s[each.index], self._inference_s) for each in self.replicas
            ),
            replicas_device=device,
        )

    def warm_up(self) -> None:
        """Start all replicas and wait until their engines are warm."""
        if self._running:
            return
        self._running = True
        _ = self.rounding  # before any start: both would create the engine
        for replica in self.replicas:
            self._launch(replica)
        self._last_notice = time.monotonic()
        while not all(replica.ready for replica in self.replicas):
            self._handle_event(_POLL_S)
        started = [replica.started for replica in self.replicas if replica.started]
        self.max_batch_size = max(each.max_batch_size for each in started)
        self.max_positions = min(each.max_positions for each in started)

    @property
    def max_running(self) -> int:
        """The requests that run at once in all replicas; known after `warm_up`."""
        return self.max_batch_size * len(self.replicas)

    def cancel(self, request_id: int) -> None:
        """End a request that runs, as `Engine.cancel`."""
        self._cancelled.put(request_id)

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """Run the requests, which must have different ids; like `Engine.generate`.

        `on_token` must be a StopWatcher or None: a request's stop strings are detected where it
        runs. One with `streams` receives each token shortly after it is known.
        """
        self.warm_up()
        start = time.perf_counter()
        complete = False
        try:
            yield from self._completions(numbered(requests))
            complete = True
        finally:
            self._inference_s += time.perf_counter() - start
            if not complete:
                self._stop()

    def finish(self) -> None:
        """Stop the replicas. They can be warmed up again."""
        self._stop()

    def close(self) -> None:
        """Stop the replicas and leave Ray. The cluster cannot be used afterwards."""
        self._stop()
        self._session.close()

    def _completions(self, source: Iterator[Request | None]) -> Iterator[Completion]:
        more = True
        check: Callable[[], None] | None = None  # raises when the job should stop
        while more or self._dispatcher.unfinished:
            wanted = self._dispatcher.assignable if more else 0
            new, more = take_requests(source, wanted) if more else ([], False)
            if new and isinstance(new[0].on_token, StopWatcher):
                check = new[0].on_token.check
            self._assign(new, last=not more)
            self._send_cancelled()
            has_room = more and self._dispatcher.assignable
            # If the source had no more for now, the next one should not wait for long.
            wait_s = _POLL_S if not has_room else 0.0 if len(new) == wanted else _SOURCE_POLL_S
            yield from self._handle_event(wait_s)
            if check is not None:
                check()

    def _send_cancelled(self) -> None:
        while not self._cancelled.empty():
            request_id = self._cancelled.get()
            found = self._dispatcher.find(request_id)
            if found is not None:
                replica = self.replicas[found[0]]
                self._call(replica, replica.actor.cancel.remote(request_id), _ignore_answer)

    def _assign(self, new: list[Request], last: bool) -> None:
        """Send new requests, and those of dead replicas, to replicas with free capacity."""
        pairs = [(request.request_id, request) for request in new]
        assigned = self._dispatcher.assign(pairs, last, time.perf_counter())
        for index, requests in assigned.items():
            replica = self.replicas[index]
            chunk = pickle.dumps([request_message(request) for request in requests])
            self._call(replica, replica.actor.submit.remote(chunk), _ignore_answer)

    def _launch(self, replica: ReplicaState) -> None:
        """Start the next process of a replica, which loads the model."""
        replica.generation += 1
        replica.ready = False
        self._start_process(replica)
        kernels = self.rounding.get(KERNEL_CHOICES, {})
        self._call(replica, replica.actor.start.remote(kernels), self._handle_start)

    def _start_process(self, replica: ReplicaState) -> None:
        if replica.actor is None:
            replica.actor = self._session.actor(Replica, self.resources, self._setup)

    def _call(self, replica: ReplicaState, reference: Any, handler: Handler) -> None:
        """Queue the result of a remote call as an event of the replica's current generation."""
        generation = replica.generation
        reference.future().add_done_callback(
            lambda answer: self._events.put(Event(replica, generation, handler, answer))
        )

    def _handle_event(self, timeout_s: float) -> list[Completion]:
        """Handle the next event, if there is one within the timeout; return its completions."""
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            self._report_missing()
            return []
        if event.generation != event.replica.generation:  # from an earlier process
            return []
        try:
            answer = event.answer.result()
        except Exception as error:
            self._handle_death(event.replica, error)
            return []
        return event.handler(event.replica, answer)

    def _handle_start(self, replica: ReplicaState, started: StartReport) -> list[Completion]:
        name = f"replica {replica.index} on host {started.host}"
        check_replica(
            name, self.rounding, started.rounding, self.dtype, self._accept_different_rounding
        )
        replica.started, replica.ready = started, True
        self._dispatcher.add(replica.index, max_in_flight(started.max_batch_size))
        self._collect(replica)
        return []

    def _collect(self, replica: ReplicaState) -> None:
        delay = collect_delay_s(len(self.replicas))
        reference = replica.actor.collect.remote(delay, max(1.0, 10 * delay))
        self._call(replica, reference, self._handle_results)

    def _handle_results(self, replica: ReplicaState, answer: bytes) -> list[Completion]:
        results: Results = pickle.loads(answer)
        self._collect(replica)
        replica.update(results)
        for notice in results.notices:
            warn(f"replica {replica.index}: {notice}")
        self._pass_on(results.tokens)
        done = [completion for completion, _ in results.finished]
        ids = [completion.request_id for completion in done]
        requests = self._dispatcher.remove_finished(replica.index, ids, time.perf_counter())
        for request, (_, error) in zip(requests, results.finished, strict=True):
            self._streamed.pop(request.request_id, None)
            if error is not None and isinstance(request.on_token, StopWatcher):
                request.on_token.error = error
        return done

    def _pass_on(self, tokens: list[StreamedToken]) -> None:
        """Call the callbacks of streamed requests.

        A request that runs again after the death of a replica repeats tokens: these are dropped.
        """
        for request_id, position, token, logprobs in tokens:
            found = self._dispatcher.find(request_id)
            if found is None or position != self._streamed.get(request_id, 0):
                continue
            self._streamed[request_id] = position + 1
            _, request = found
            if request.on_token is not None:
                request.on_token(token)
            if request.on_logprobs is not None and logprobs is not None:
                request.on_logprobs(logprobs)

    def _handle_death(self, replica: ReplicaState, error: Exception) -> None:
        """Restart a dead replica. Raises GetpError if it keeps dying, or the error of its start."""
        cause = getattr(error, "cause", None)
        if not replica.ready and isinstance(cause, EngineError | CheckpointError | GetpError):
            raise cause  # a restart would fail in the same way
        reason = death_reason(cause or error)
        self._session.ray.kill(replica.actor)
        replica.actor = None
        lost = self._dispatcher.remove(replica.index, time.perf_counter())
        replica.record_death(len(lost))
        if replica.deaths_in_a_row >= _MAX_DEATHS:
            ids = ", ".join(map(str, lost[:8])) + (" …" if lost[8:] else "")
            when = f"while running requests {ids} (counted from 0)" if lost else "while starting"
            raise GetpError(
                f"replica {replica.index} died {replica.deaths_in_a_row} times in a row, the last "
                f"time {when}: {reason}"
            )
        warn(
            f"replica {replica.index} died and is being restarted (requests reassigned: "
            f"{len(lost)}): {reason}"
        )
        self._launch(replica)

    def _report_missing(self) -> None:
        missing, now = [replica for replica in self.replicas if not replica.ready], time.monotonic()
        if missing and now - self._last_notice > _SLOW_START_S:
            print_message(missing_notice(missing, len(self.replicas)))
        elif missing:
            return
        self._last_notice = now

    def _stop(self) -> None:
        """Stop all replicas at once."""
        for replica in self.replicas:
            replica.generation += 1
            replica.ready = False
            if replica.actor is not None:
                self._session.ray.kill(replica.actor)
                replica.actor = None
        busy_s = self._dispatcher.busy_s
        self._dispatcher = Dispatcher(_share_prompt)
        self._dispatcher.busy_s = busy_s
        self._running = False


def _share_prompt(first: Request, second: Request) -> bool:
    """Whether two requests are for answers to the same prompt."""
    return first.prompt_ids is second.prompt_ids


def _ignore_answer(replica: ReplicaState, answer: None) -> list[Completion]:
    return []
