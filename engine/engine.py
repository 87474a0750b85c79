"""The engine: warm_up, then generate (requests in, completions out as they finish), then finish."""

import contextlib
import itertools
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from weakref import WeakSet

import torch

from engine.config import EngineConfig
from engine.decode_graphs import Capture, gpu_capture
from engine.errors import EngineError, RequestError
from engine.kv_cache import KVCache
from engine.memory_plan import MemoryPlan, available_bytes, is_out_of_memory, size
from engine.model_runner import ModelRunner
from engine.parallel.coordinator import CoordinatorRunner, Ranks
from engine.request import Completion, Request
from engine.resolve import dtype_name, resolve
from engine.sampler import NO_TOKEN, Sampled
from engine.scheduler import Scheduler, Sequence, Step
from engine.stats import EngineStats
from engine.summary import RunSummary, peak_resident_bytes
from model import ModelConfig, load_config
from model.ops.step_parts import SCHEDULING

_log = logging.getLogger(__name__)

# Hidden size below which an op is too small to be shared: a second thread gains nothing, and on a
# busy machine each op waits for it.
_NARROW = 512
# On a GPU a step with a chunk takes the host milliseconds to launch, a replayed one a tenth of that
# (benchmarks/RESULTS.md). Of 32 that run then half of one is missing on average.
_TOGETHER = 32
_ON_GPU: "WeakSet[Engine]" = WeakSet()  # those of this process that have something there


class Engine:
    """Runs requests of one checkpoint on one device, continuously batched.

        with Engine("data/model") as engine:
            for completion in engine.generate([Request([1, 2, 3])]):
                print(completion.token_ids)

    With `tensor_parallel` above 1, that many processes compute the model together, each on its own
    GPU or with its share of the CPU's cores. `ranks` are such processes, started earlier and kept
    when the engine finishes; their number replaces `config.tensor_parallel`. `notice` is called
    with warnings. Raises CheckpointError for a checkpoint that cannot be used and EngineError for
    settings that cannot work here.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        config: EngineConfig = EngineConfig(),  # noqa: B008 - immutable
        *,
        ranks: Ranks | None = None,
        notice: Callable[[str], None] = _log.warning,
    ):
        if ranks is not None:
            config = replace(config, tensor_parallel=ranks.size)
        self.checkpoint = Path(checkpoint)
        self.config = config
        self.model_config = load_config(checkpoint)
        settings = resolve(config, self.model_config)
        self.tensor_parallel = settings.tensor_parallel
        self.device, self.dtype = settings.device, settings.dtype
        self.held_config = settings.model
        self.max_batch_size = settings.max_batch_size
        self.max_batch_tokens = settings.max_batch_tokens
        on_cpu = settings.on_cpu
        self.stats = EngineStats()
        self._notice = notice  # told what a user should know of a run that goes on
        self.max_positions = self.model_config.max_positions  # less where the KV pool is smaller
        self._ranks = ranks or Ranks(self.tensor_parallel)
        self._keep_ranks = ranks is not None
        self._runner = (
            CoordinatorRunner(self.model_config, self.device, self.dtype, self._ranks)
            if self.tensor_parallel > 1
            else ModelRunner(self.model_config, self.device, self.dtype)
        )
        self._scheduler: Scheduler | None = None
        self._generating = False
        # Steps launched whose tokens are not read yet, and how many there may be while the next
        # one is scheduled: what a GPU is given before it is through keeps it busy.
        self._launched: deque[tuple[Step, Sampled]] = deque()
        self._ahead = 0 if on_cpu else 1
        self._make_capture = None if on_cpu else gpu_capture
        self._together = 0 if on_cpu else _TOGETHER
        self._threads = torch.get_num_threads()

    def __enter__(self) -> "Engine":
        self.warm_up()
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()

    def warm_up(self) -> None:
        """Load the weights, size the KV pool from the memory that is left, and allocate it.

        On a GPU the largest step is run to see what it takes, and decode steps are captured.
        Raises EngineError, before anything is loaded, if memory is too small for what is asked.
        """
        if self._scheduler is not None:
            return
        if self.device.type == "cuda" and self.device.index is not None:
            # Streams, graphs and kernels belong to the current device.
            torch.cuda.set_device(self.device)
        start = time.perf_counter()
        needs = MemoryPlan.of(
            self.held_config,
            self.device,
            self.dtype,
            self.max_batch_size,
            self.max_batch_tokens,
            self.tensor_parallel,
            self.config.block_size,
        )
        least = (len(self._runner.groups) + 1) * self._runner.block_bytes(self.config.block_size)
        self._threads = torch.get_num_threads()
        if self.device.type != "cpu":
            _ON_GPU.add(self)
        try:
            self._take_threads()
            self._check_kv_memory(least)
            self._check_memory(needs, max(least, self.config.kv_memory or 0))
            loading = time.perf_counter()
            self._runner.load(self.checkpoint, self.config.dummy_weights)
            self.stats.load_s += time.perf_counter() - loading
            self._start(needs, least)
        except BaseException as error:
            self._free()
            if not is_out_of_memory(error):
                raise
            raise EngineError(
                "out of memory while the model was loaded; {available} are available now: lower "
                "{kv_memory} or {max_batch_size}, or use a smaller model or {dtype}",
                available=size(available_bytes(self.device)),
            ) from error
        self.stats.warm_up_s += time.perf_counter() - start

    def _take_threads(self) -> None:
        """Set how many threads compute on a CPU, and bring the other ranks up with as many."""
        threads = max(1, self._threads // self.tensor_parallel)
        if self.model_config.hidden_size < _NARROW:
            threads = 1
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
        if isinstance(self._runner, CoordinatorRunner):
            self._runner.connect(self.checkpoint, threads)

    def _free(self) -> None:
        self._runner.free()
        _ON_GPU.discard(self)
        if self.device.type != "cpu" and not _ON_GPU:
            # cuBLAS has memory for each stream that it has met, which captured steps of whatever
            # engine read. Torch has no public name for this.
            torch._C._cuda_clearCublasWorkspaces()
        if not self._keep_ranks:
            self._ranks.close()
        torch.set_num_threads(self._threads)

    def _available(self) -> int:
        """Bytes that can still be allocated, here and on every other rank."""
        if isinstance(self._runner, CoordinatorRunner):
            return self._runner.available()
        return available_bytes(self.device)

    def _start(self, needs: MemoryPlan, least: int) -> None:
        """Size the KV pool, at least so many bytes, and allocate it."""
        if self.device.type == "cuda":
            needs = self._measured(needs)
        blocks = self._pool_blocks(needs, least)
        cache = KVCache(
            self._runner.groups, blocks, self.config.block_size, self.config.prefix_cache
        )
        limit = min(self.model_config.max_positions, cache.capacity(self.max_batch_tokens))
        if limit < 1:
            raise EngineError(
                "the KV cache holds {blocks} blocks, too few for one token; raise {kv_memory}",
                blocks=blocks,
            )
        self.max_positions = limit
        self._runner.allocate(blocks, self.config.block_size, limit, self.max_batch_size)
        together = self._together
        if self._make_capture is not None:
            if not self._capture(self._make_capture(self.stats)):
                together = 0
        elif (
            self.tensor_parallel == 1 and (recorder := self._runner.backend.recorder()) is not None
        ):
            # A model of which torch computes a part cannot be recorded; it only takes longer.
            # Nor can what ranks tell each other.
            with contextlib.suppress(RuntimeError):
                self._runner.capture(recorder, ahead_of_time=False)
        self._scheduler = Scheduler(cache, self.max_batch_size, self.max_batch_tokens, together)
        self.stats.kv_blocks = blocks - 1
        self.stats.kv_bytes = blocks * self._runner.block_bytes(self.config.block_size)

    def _capture(self, capture: Capture) -> bool:
        """Capture decode steps; False: it cannot be, and goes on without, which is said."""
        start, compiled = time.perf_counter(), self.stats.compile_s
        captured = True
        try:
            self._runner.capture(capture)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            # A capture that fails within fails once more as it ends, and does not say of what.
            cause = error.__context__ or error
            self._notice(f"decode steps are not replayed as graphs: {cause}")
            captured = False
        compiling = self.stats.compile_s - compiled
        self.stats.capture_s += time.perf_counter() - start - compiling
        return captured

    def _measured(self, needs: MemoryPlan) -> MemoryPlan:
        """The needs, with what the largest step took on this device in place of estimates."""
        start, before = time.perf_counter(), torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._runner.rehearse(
            self.max_batch_size,
            self.max_batch_tokens,
            min(self.model_config.max_positions, self.max_batch_tokens),
            self.config.block_size,
        )
        self.stats.compile_s += time.perf_counter() - start
        step = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        # Captured steps have memory of their own: a decode step's, and the logits that they share.
        rows = min(self.max_batch_size, self.max_batch_tokens)
        logits = 2 * rows * self.model_config.vocab_size * self.dtype.itemsize
        decode = needs.activations * rows // self.max_batch_tokens
        return replace(needs, activations=max(step, 0) + decode, logits=logits)

    def finish(self) -> None:
        """Give weights, KV memory and captured steps back. The engine can be warmed up again."""
        start = time.perf_counter()
        self._scheduler = None
        self._free()
        if self.device.type != "cpu":
            torch.cuda.empty_cache()
        self.stats.finish_s += time.perf_counter() - start

    def summary(self) -> RunSummary:
        """What a report needs to know of the runs so far; also valid after `finish`."""
        on_gpu = self.device.type == "cuda"
        return RunSummary(
            device=torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
            device_type="cuda" if on_gpu else "cpu",
            device_count=1,  # of several ranks, `stats` and the peaks are one device's part
            dtype=dtype_name(self.dtype),
            tensor_parallel=self.tensor_parallel,
            max_batch_size=self.max_batch_size,
            config=self.held_config,
            stats=self.stats,
            peak_memory_bytes=peak_resident_bytes(),
            peak_gpu_memory_bytes=torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
        )

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """Run the requests; yields each completion as it finishes, in any order.

        Requests are taken from the iterable as there is room for them; None from it means that
        there is none just now: it is asked again after the next step. One that cannot run comes
        back with finish reason "error" and harms no other. Closing the iterator cancels the rest.
        """
        self.warm_up()
        scheduler = self._scheduler
        if scheduler is None or self._generating:
            raise RuntimeError("generate() is already running on this engine")
        self._generating = True
        start = time.perf_counter()
        source = iter(requests)
        complete = False
        try:
            more = True
            while more or scheduler.running or scheduler.waiting:
                room = self.max_batch_size - len(scheduler.waiting)
                taken, more = _take(source, room) if more else ([], False)
                for request in taken:
                    sequence = self._sequence(request, scheduler)
                    if isinstance(sequence, Completion):
                        yield sequence
                    else:
                        scheduler.add(sequence)
                if scheduler.running or scheduler.waiting:
                    yield from self._step(scheduler)
            complete = True
        finally:
            if not complete:
                # Whatever stopped us may have left a step half computed.
                scheduler.finish([*scheduler.running, *scheduler.waiting])
                scheduler.cache.forget_prefixes()
            self._launched.clear()
            self._generating = False
            self.stats.inference_s += time.perf_counter() - start

    def _step(self, scheduler: Scheduler) -> list[Completion]:
        """Launch a step and read those that were launched long enough before."""
        start = time.perf_counter()
        with SCHEDULING:
            step = scheduler.schedule()
        planned = time.perf_counter()
        self.stats.schedule_s += planned - start
        if not step.size:
            return self._read(scheduler)
        try:
            sampled = self._runner.launch(step)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            done = self._read(scheduler)
            self._back_off(step, scheduler, error)
            return done
        self.stats.model_s += time.perf_counter() - planned
        scheduler.calm()
        self.stats.count(step, scheduler)
        self._launched.append((step, sampled))
        return self._read(scheduler, self._ahead)

    def _read(self, scheduler: Scheduler, ahead: int = 0) -> list[Completion]:
        """Read the launched steps but the last `ahead`; the completions that they bring."""
        done = []
        while len(self._launched) > ahead:
            step, sampled = self._launched.popleft()
            start = time.perf_counter()
            tokens, logprobs = sampled.read()
            now = time.perf_counter()
            self.stats.model_s += now - start
            ended = []
            for i, (sequence, token) in enumerate(zip(step.sampling(), tokens, strict=True)):
                if sequence.finished:  # its end was not known when this step was launched
                    continue
                if token == NO_TOKEN:
                    ended.append(sequence)
                    done.append(sequence.completion("error", now, _not_finite(self.dtype)))
                    continue
                reason = sequence.append(token, now)
                if sequence.logprobs is not None:
                    sequence.logprobs.append(logprobs[i])
                if reason is not None:
                    ended.append(sequence)
                    done.append(sequence.completion(reason, now))
                    self.stats.count_finished(done[-1])
            if ended:
                scheduler.finish(ended)
        return done

    def _back_off(self, step: Step, scheduler: Scheduler, error: Exception) -> None:
        """Go on with half of a step that ran out of memory. Raises EngineError for the least."""
        if not scheduler.back_off(step):
            raise EngineError(
                "out of memory in a step of one token; {available} are available: lower "
                "{kv_memory}, or use a smaller model or {dtype}",
                available=size(available_bytes(self.device)),
            ) from error
        self.stats.back_offs += 1
        # The tensors of the failed step live as long as the frames in its traceback.
        traceback.clear_frames(error.__traceback__)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._notice(
            f"out of memory in a step of {step.size} requests and {step.tokens} tokens; going on"
            f" with at most {scheduler.max_batch_size} and {scheduler.max_batch_tokens}"
        )

    def _sequence(self, request: Request, scheduler: Scheduler) -> Sequence | Completion:
        """A queued form of the request, or the completion that says why it cannot run."""
        now = time.perf_counter()
        params = request.params
        limit = min(self.max_positions, params.max_positions or self.max_positions)
        problem = _problem(request, limit, self.model_config)
        if problem is not None:
            return Completion(
                request.request_id,
                [],
                "error",
                problem,
                prompt_tokens=len(request.prompt_ids),
                arrived=now,
                first_token=now,
                finished=now,
            )
        if params.max_new_tokens is not None:
            limit = min(limit, len(request.prompt_ids) + params.max_new_tokens)
        own = frozenset[int]() if params.ignore_eos else self.model_config.stop_ids
        return Sequence(
            request,
            list(request.prompt_ids),
            limit,
            own | params.stop_ids,
            scheduler.cache.new_tables(),
            now,
            logprobs=None if params.logprobs is None else [],
        )

    def _check_kv_memory(self, least: int) -> None:
        """Raise EngineError if the KV memory that was given is too small for any request."""
        if self.config.kv_memory is not None and self.config.kv_memory < least:
            block = self._runner.block_bytes(self.config.block_size)
            raise EngineError(
                "{kv_memory} {given} means {given} bytes, which hold {blocks} blocks of {block} "
                "bytes; use at least {least} bytes, or lower {block_size}",
                given=self.config.kv_memory,
                blocks=self.config.kv_memory // block,
                block=block,
                least=least,
            )

    def _check_memory(self, needs: MemoryPlan, kv: int) -> None:
        """Raise EngineError, with the arithmetic, if a run would need more than there is."""
        available = self._available()
        given = self.config.kv_memory is not None
        shortage = needs.shortage(kv, given, available, self.device, self.dtype)
        if shortage is not None:
            raise shortage

    def _pool_blocks(self, needs: MemoryPlan, least: int) -> int:
        """Blocks of the KV pool: what memory allows, but no more than the batch can ever use."""
        block = self._runner.block_bytes(self.config.block_size)
        if self.config.kv_memory is not None:
            return self.config.kv_memory // block
        loaded = replace(needs, weights=0)
        self._check_memory(loaded, least)
        # On a CPU the rest of the machine needs memory too, and untouched blocks cost nothing.
        share = 0.4 if self.device.type == "cpu" else 0.9
        left = self._available() - loaded.total
        affordable = max(least, int(left * share)) // block
        per_sequence = -(-self.model_config.max_positions // self.config.block_size) * len(
            self._runner.groups
        )
        useful = 2 * self.max_batch_size * per_sequence  # twice: room for cached prefixes
        return 1 + min(affordable - 1, useful)


def _take(source: Iterator[Request | None], room: int) -> tuple[list[Request], bool]:
    """Up to `room` requests that are there now, and whether more may come."""
    taken: list[Request] = []
    for request in itertools.islice(source, max(room, 0)):
        if request is None:
            return taken, True
        taken.append(request)
    return taken, len(taken) == max(room, 0)


def _not_finite(dtype: torch.dtype) -> RequestError:
    """The error of a request whose next token cannot be chosen, and what may help."""
    remedies = {
        torch.float16: "use {dtype} bfloat16 or float32",
        torch.bfloat16: "use {dtype} float32",
    }
    remedy = remedies.get(dtype, "check that the checkpoint is intact")
    return RequestError(
        "the model's logits are not finite in {name}; " + remedy, name=dtype_name(dtype)
    )


def _problem(request: Request, limit: int, config: ModelConfig) -> RequestError | None:
    """Why a request cannot run; limit: positions that it may have."""
    ids, vocab = request.prompt_ids, config.vocab_size
    if not len(ids):
        return RequestError("the prompt is empty")
    if len(ids) >= limit:
        reason = "the model's limit"
        if limit == request.params.max_positions:
            reason = "set by {max_positions}; the model's limit is {model_limit}"
        elif limit < config.max_positions:
            reason = "all that the KV cache holds; the model's limit is {model_limit}"
        return RequestError(
            "the prompt has {length} tokens, which leaves no room for output within the limit of "
            "{limit} positions (" + reason + ")",
            length=len(ids),
            limit=limit,
            model_limit=config.max_positions,
        )
    if min(ids) < 0 or max(ids) >= vocab:
        return RequestError(
            "the prompt has token ids outside the vocabulary of {vocab} tokens", vocab=vocab
        )
    return None
