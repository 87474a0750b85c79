"""Engine: warm_up, then generate (requests → completions, as they finish), then finish."""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.execution.capture import Capture, GpuCapture
from engine.execution.capture_fallback import crash_of_hip
from engine.execution.matchers import Matchers
from engine.execution.model_runner import ModelRunner
from engine.kernels import choose_kernels, described
from engine.memory_plan import (
    BlockCost,
    MemoryPlan,
    available_bytes,
    check_before_loading,
    conversion_notice,
    format_bytes,
    is_out_of_memory,
    quantization_notice,
)
from engine.parallel.coordinator import CoordinatorRunner
from engine.parallel.worker_pool import WorkerPool
from engine.request import Completion, Request, numbered
from engine.resolve import dtype_name, load_model_config, resolve, rounding
from engine.scheduling.admission import admit, take_requests
from engine.scheduling.sequence import Sequence
from engine.stats import EngineStats
from engine.step_loop import StepLoop
from engine.summary import RunSummary, longest_wait, peak_resident_bytes, thread_waits
from engine.warm_up import prepare
from model.checks.verify import Kernels
from model.cost.workload import kv_dtype
from model.ops.cpu.topology import usable_threads
from model.ops.specs import COMPRESSED_ROWS

_log = logging.getLogger(__name__)

# Below this hidden size a single thread is faster: operations are too small to divide, and on a
# busy machine threads wait for each other in every operation.
_ONE_THREAD_HIDDEN_SIZE = 512
# On a GPU the host needs milliseconds to launch a step with a chunk, and a tenth of that to replay
# a captured step (benchmarks/RESULTS.md). Waiting until one in 32 sequences has finished leaves
# 1/64 of the batch unused on average.
_GPU_GROUP_SIZE = 32
_COPY_SHARE = 0.25  # of the memory that a run leaves, for copies of weights
_COMPILING_S = 0.01  # longest wait for a grammar before new requests are taken
_gpu_engines: "WeakSet[Engine]" = WeakSet()  # engines of this process that hold GPU memory


class Engine:
    """Runs requests of one checkpoint on one device with continuous batching.

        with Engine("data/model") as engine:
            for completion in engine.generate([Request([1, 2, 3])]):
                print(completion.token_ids)

    With `tensor_parallel` above 1, the model is split over that many processes, each with its own
    GPU or its share of the CPU's cores. `workers` is a pool of such processes that outlives the
    engine; its size replaces `config.tensor_parallel`. `notice` is called with each warning. Raises
    CheckpointError for a checkpoint that cannot be used and EngineError for settings that cannot
    work here.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        config: EngineConfig = EngineConfig(),  # noqa: B008 - immutable
        *,
        workers: WorkerPool | None = None,
        notice: Callable[[str], None] = _log.warning,
    ):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        if workers is not None:
            config = replace(config, tensor_parallel=workers.size)
        self.checkpoint, self.config = Path(checkpoint), config
        self.model_config = load_model_config(checkpoint, config, notice)
        self.settings = settings = resolve(config, self.model_config)
        self.device, self.dtype = settings.device, settings.dtype
        self.held_config, self.tensor_parallel = settings.model, settings.tensor_parallel
        self.max_batch_size = settings.max_batch_size
        self.max_batch_tokens = settings.max_batch_tokens
        self.max_positions = self.model_config.max_positions  # less if the KV cache is smaller
        self.stats = EngineStats()
        self.notice = notice
        for text in (
            conversion_notice(self.checkpoint, self.model_config, settings),
            quantization_notice(self.model_config, settings),
        ):
            if text:
                notice(text)
        # Chosen for the device; a change takes effect at the next warm_up.
        self.lookahead = 0 if settings.on_cpu else 1  # see StepLoop
        self.group_size = 0 if settings.on_cpu else _GPU_GROUP_SIZE  # see Scheduler
        self.make_capture: Callable[[EngineStats], Capture] | None = (
            None if settings.on_cpu else GpuCapture
        )
        self.checks_kernels = not settings.on_cpu and not config.trust_kernels
        # Returns the content of tokenizer.json, which grammars need; set it before they are used.
        self.tokenizer_json: Callable[[], str] | None = None
        self.workers = workers or WorkerPool(self.tensor_parallel)
        self._keep_workers = workers is not None
        self.runner = (
            CoordinatorRunner(self.model_config, self.device, self.dtype, self.workers)
            if self.tensor_parallel > 1
            else ModelRunner(self.model_config, self.device, self.dtype)
        )
        self._kernels: Kernels | None = None
        self._steps: StepLoop | None = None
        self._generating = False
        self._cancelled: deque[int] = deque()  # ids of requests that are to end
        # The iterators that `generate` has returned and that still exist.
        self._iterators: WeakSet[Generator[Completion, None, None]] = WeakSet()
        self._threads = torch.get_num_threads()

    def __enter__(self) -> "Engine":
        self.warm_up()
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()

    @property
    def max_running(self) -> int:
        """The requests that can run at once."""
        return self.max_batch_size

    @property
    def kv_dtype(self) -> str:
        """The dtype of the KV cache, one of `KV_DTYPES`."""
        return kv_dtype(self.model_config, dtype_name(self.dtype))

    @property
    def steps(self) -> StepLoop:
        """The step loop and its scheduler, for probes. Raises RuntimeError before warm_up."""
        if self._steps is None:
            raise RuntimeError("the engine is not warmed up: call warm_up() first")
        return self._steps

    def choose_kernels(
        self, preferred: Mapping[str, Any] | None = None, expected_s: float | None = None
    ) -> None:
        """Check the kernels on this device, once; later calls change nothing. `warm_up` calls it.

        preferred: the choices of an earlier part of the same job, to continue it with the same
        rounding; None: there is none. expected_s: how long the requests will take, which decides
        whether candidates are also timed; None: not known, so they are not.
        """
        if self._kernels is None:
            start = time.perf_counter()
            self._kernels = choose_kernels(self, preferred, expected_s)
            self.stats.check_s += time.perf_counter() - start

    @property
    def kernels(self) -> Kernels:
        """The kernels other than the defaults, from `choose_kernels`."""
        self.choose_kernels()
        assert self._kernels is not None
        return self._kernels

    @cached_property
    def matchers(self) -> Matchers | None:
        """What says which tokens the grammars of requests allow; None without `tokenizer_json`."""
        if self.tokenizer_json is None:
            return None
        config = self.model_config
        return Matchers(self.tokenizer_json, config.vocab_size, config.stop_ids)

    @cached_property
    def capture_crash(self) -> str:
        """Why captures must not be tried in this process, "" if they may; see `crash_of_hip`."""
        if self.make_capture is None:
            return ""
        dtype = dtype_name(self.dtype)
        kv_dtype, block_size = self.config.kv_dtype, self.settings.block_size
        return crash_of_hip(self.checkpoint, self.device, dtype, kv_dtype, block_size)

    @property
    def rounding(self) -> dict[str, Any]:
        """What the rounding of results depends on besides checkpoint and dtype, as JSON values."""
        choices = self.kernels.choices
        return rounding(self.device, self.dtype, self.tensor_parallel, choices)

    def warm_up(self) -> None:
        """Load the weights, then size the KV cache from the memory that is left and allocate it.

        On a GPU the largest step is run to measure its memory, and decode steps are captured.
        Raises EngineError, before anything is loaded, if there is not enough memory.
        """
        if self._steps is not None:
            return
        if self.device.type == "cuda" and self.device.index is not None:
            # Streams, graphs and kernels belong to the current device.
            torch.cuda.set_device(self.device)
        self.choose_kernels()
        start = time.perf_counter()
        if not self.config.dummy_weights:
            # First, because memory is calculated from the config.
            self.runner.check(self.checkpoint, self.config.adapter)
        plan = MemoryPlan.of(self.settings)
        cost = BlockCost(
            len(self.runner.groups),
            self.runner.block_bytes(self.settings.block_size),
            self.runner.state_bytes(),
        )
        self._threads = torch.get_num_threads()
        if not self.settings.on_cpu:
            _gpu_engines.add(self)
        try:
            self._set_threads()
            if self.kernels.choices:
                self.runner.set_kernels(self.kernels.choices)
            available = self.available_bytes()
            check_before_loading(plan, cost, self.settings, available)
            if self.tensor_parallel == 1:
                left = available - plan.total - (self.settings.kv_memory or 0)
                self.runner.backend.allow_copies(int(max(0, left) * _COPY_SHARE))
            loading = time.perf_counter()
            self.runner.load(self.checkpoint, self.config.dummy_weights, self.config.adapter)
            if self.max_batch_size <= COMPRESSED_ROWS:
                self.runner.backend.compress()
            self.stats.load_s += time.perf_counter() - loading
            self._steps = prepare(self, plan, cost)
        except BaseException as error:
            self._free()
            if not is_out_of_memory(error):
                raise
            raise EngineError(
                "out of memory while the model was loaded; {available} are available now: lower "
                "{kv_memory} or {max_batch_size}, or use a smaller model or {dtype}",
                available=format_bytes(available_bytes(self.device)),
            ) from error
        self.stats.warm_up_s += time.perf_counter() - start

    def _set_threads(self) -> None:
        """Start the other ranks, and set the number of CPU threads on every rank."""
        threads = max(1, usable_threads(self._threads) // self.tensor_parallel)
        if self.model_config.hidden_size < _ONE_THREAD_HIDDEN_SIZE:
            threads = 1
        if self.settings.on_cpu:
            torch.set_num_threads(threads)
        if isinstance(self.runner, CoordinatorRunner):
            adapters = () if self.config.dummy_weights else self.config.adapter
            self.runner.connect(self.checkpoint, self.config.quantize, adapters, threads)

    def available_bytes(self) -> int:
        """Bytes that can still be allocated, here and on every other rank."""
        if isinstance(self.runner, CoordinatorRunner):
            return self.runner.available()
        return available_bytes(self.device)

    def finish(self) -> None:
        """Free weights, KV cache and captured steps, and cancel all unfinished requests.

        The engine can be warmed up again.
        """
        start = time.perf_counter()
        for iterator in list(self._iterators):
            iterator.close()
        self._steps = None
        if "matchers" in self.__dict__ and self.matchers is not None:
            self.matchers.close()
        self._free()
        if not self.settings.on_cpu:
            torch.cuda.empty_cache()
        self.stats.finish_s += time.perf_counter() - start

    def _free(self) -> None:
        self.runner.free()
        _gpu_engines.discard(self)
        if not self.settings.on_cpu and not _gpu_engines:
            # cuBLAS keeps a workspace for each stream that it has run on. Captured steps of any
            # engine may use it, so only the last engine frees it; torch has no public function.
            torch._C._cuda_clearCublasWorkspaces()
        if not self._keep_workers:
            self.workers.close()
        torch.set_num_threads(self._threads)

    def generate(self, requests: Iterable[Request | None]) -> Generator[Completion, None, None]:
        """Run the requests; yields each completion as it finishes, in any order.

        Requests are taken from the iterable while there is room for them. None means that no
        request is available now: the iterable is polled again after the next step. A request
        without an id gets its position as its id; one without a seed gets a random seed. A request
        that cannot run completes with finish reason "error" and does not affect the others. Closing
        the iterator, or an exception, cancels all unfinished requests; the engine can then run
        others. With a `priority` above 0, any number of requests is taken, so that they do not
        keep others from being taken: their source must limit them. Raises TypeError for anything
        but requests, EngineError if memory runs out and RuntimeError if `generate` is already
        running.
        """
        iterator = self._completions(numbered(requests))
        self._iterators.add(iterator)
        return iterator

    def cancel(self, request_id: int) -> None:
        """End a running or waiting request before the next step; others are not affected.

        It completes with the finish reason "cancelled". May be called from any thread while
        `generate` runs; an id that is not in the engine has no effect.
        """
        self._cancelled.append(request_id)

    def _completions(self, source: Iterator[Request | None]) -> Generator[Completion, None, None]:
        self.warm_up()
        if self._generating:
            raise RuntimeError(
                "generate() is already running on this engine: read its iterator to the end or "
                "close it; finish() also ends it"
            )
        steps, scheduler = self.steps, self.steps.scheduler
        compiling = list[Sequence]()  # their grammars are; those of others must not wait for them
        start, waits = time.perf_counter(), thread_waits()
        self._generating, complete, more = True, False, True
        try:
            while more or scheduler.running or scheduler.waiting or compiling:
                room = self.max_batch_size - scheduler.first_waiting - len(compiling)
                taken, more = take_requests(source, room) if more else ([], False)
                for request in taken:
                    if request.params.grammar is not None:
                        steps.matchers = self.matchers
                    admitted = admit(
                        request,
                        self.model_config,
                        self.max_positions,
                        scheduler.cache,
                        steps.matchers,
                    )
                    if isinstance(admitted, Completion):
                        yield admitted
                    elif admitted.matcher is not None:
                        compiling.append(admitted)
                    else:
                        scheduler.add(admitted)
                if compiling:
                    yield from self._start_compiled(compiling)
                if self._cancelled:
                    cancelled = {self._cancelled.popleft() for _ in range(len(self._cancelled))}
                    yield from steps.cancel_requests(cancelled, compiling)
                if scheduler.running or scheduler.waiting:
                    yield from steps.run_step()
            complete = True
        finally:
            if not complete:
                steps.cancel()
            steps.clear()
            self._generating = False
            self.stats.inference_s += time.perf_counter() - start
            self.stats.cpu_wait_s += longest_wait(waits, thread_waits())

    def _start_compiled(self, compiling: list[Sequence]) -> Iterator[Completion]:
        """Queue the sequences whose grammars are compiled; yield those that cannot run."""
        scheduler = self.steps.scheduler
        first = compiling[0].matcher
        if not (scheduler.running or scheduler.waiting) and first is not None:
            first.wait(_COMPILING_S)
        for sequence in compiling.copy():
            matcher = sequence.matcher
            if matcher is None or not matcher.is_compiled:
                continue
            compiling.remove(sequence)
            if matcher.error is None:
                scheduler.add(sequence)
            else:
                yield sequence.completion("error", time.perf_counter(), matcher.error)

    def summary(self) -> RunSummary:
        """The summary that reports need of the runs so far; also valid after `finish`."""
        on_gpu = self.device.type == "cuda"
        return RunSummary(
            device=torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
            device_type="cuda" if on_gpu else "cpu",
            device_count=1,  # with several ranks, a report divides the work among them
            dtype=dtype_name(self.dtype),
            tensor_parallel=self.tensor_parallel,
            max_batch_size=self.max_batch_size,
            config=self.held_config,
            stats=self.stats,
            peak_memory_bytes=peak_resident_bytes(),
            peak_gpu_memory_bytes=torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
            kernels=described(self.runner.backend, self.kernels),
        )
