"""The engine: warm_up, then generate (requests in, completions out as they finish), then finish."""

import itertools
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.kv_cache import KVCache
from engine.memory import Needs, available_bytes, is_out_of_memory
from engine.request import Completion, FinishReason, Request
from engine.runner import ModelRunner
from engine.scheduler import Chunk, Scheduler, Sequence
from model import load_config


class EngineError(ValueError):
    """The engine cannot run as it was asked to; the message says what to change."""


_log = logging.getLogger(__name__)

# Hidden size below which an op is too small to be shared: a second thread gains nothing, and on a
# busy machine each op waits for it.
_NARROW = 512

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class EngineStats:
    """Counters since the engine was made; times in seconds."""

    steps: int = 0
    prompt_tokens: int = 0  # of finished requests
    cached_tokens: int = 0  # of those, found in the prefix cache
    output_tokens: int = 0
    preemptions: int = 0
    back_offs: int = 0  # steps that ran out of memory and were taken back
    batch_sum: int = 0  # sequences a step, summed over steps
    peak_batch: int = 0
    kv_blocks: int = 0
    kv_bytes: int = 0
    peak_kv_blocks: int = 0
    decode_tokens: int = 0  # computed, one of a sequence in a step
    decode_context: int = 0  # positions that these attended, without windows
    prefill_chunks: int = 0  # of more than one token
    prefill_tokens: int = 0
    prefill_context: int = 0  # lengths at the ends of the chunks
    kv_full_steps: int = 0  # steps in which requests waited for blocks alone
    short_steps: int = 0  # steps that had room for more requests than there were
    schedule_s: float = 0.0
    model_s: float = 0.0  # the model's steps, sampling included
    warm_up_s: float = 0.0
    inference_s: float = 0.0
    finish_s: float = 0.0


class Engine:
    """Runs requests of one checkpoint on one device, continuously batched.

        with Engine("data/model") as engine:
            for completion in engine.generate([Request([1, 2, 3])]):
                print(completion.token_ids)

    Arguments left at None are chosen for the device. Raises CheckpointError for a checkpoint that
    cannot be used and EngineError for settings that cannot work here.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_size: int | None = None,
        max_batch_tokens: int | None = None,
        kv_memory: int | None = None,
        block_size: int = 16,
        prefix_cache: bool = True,
        dummy_weights: bool = False,
        notice: Callable[[str], None] = _log.warning,
    ):
        self.checkpoint = Path(checkpoint)
        self.config = load_config(checkpoint)
        self.device = _device(device)
        self.dtype = choose_dtype(dtype, self.config.dtype, self.device)
        on_cpu = self.device.type == "cpu"
        self.max_batch_size = _at_least_1("max_batch_size", max_batch_size, 64 if on_cpu else 256)
        self.max_batch_tokens = _at_least_1(
            "max_batch_tokens", max_batch_tokens, 512 if on_cpu else 8192
        )
        self.block_size = _at_least_1("block_size", block_size, 16)
        self.kv_memory = kv_memory
        self.prefix_cache = prefix_cache
        self.dummy_weights = dummy_weights
        self.stats = EngineStats()
        self._notice = notice  # told what a user should know of a run that goes on
        self.max_positions = self.config.max_positions  # less where the KV pool is smaller
        self._runner = ModelRunner(self.config, self.device, self.dtype)
        self._scheduler: Scheduler | None = None
        self._generating = False
        self._threads = torch.get_num_threads()

    def __enter__(self) -> "Engine":
        self.warm_up()
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()

    def warm_up(self) -> None:
        """Load the weights, size the KV pool from the memory that is left, and allocate it.

        Raises EngineError, before anything is loaded, if memory is too small for what is asked.
        """
        if self._scheduler is not None:
            return
        start = time.perf_counter()
        needs = Needs.of(
            self.config, self.device, self.dtype, self.max_batch_size, self.max_batch_tokens
        )
        least = (len(self._runner.groups) + 1) * self._runner.block_bytes(self.block_size)
        self._check_memory(needs, max(least, self.kv_memory or 0))
        self._threads = torch.get_num_threads()
        if self.device.type == "cpu" and self.config.hidden_size < _NARROW:
            torch.set_num_threads(1)
        try:
            self._runner.load(self.checkpoint, self.dummy_weights)
            self._start(needs, least)
        except Exception as error:
            self._runner.free()
            if not is_out_of_memory(error):
                raise
            raise EngineError(
                f"out of memory while the model was loaded, and {available_bytes(self.device)}"
                " bytes are available now; lower --kv-memory, or use a smaller model or --dtype"
            ) from error
        self.stats.warm_up_s += time.perf_counter() - start

    def _start(self, needs: Needs, least: int) -> None:
        """Size the KV pool, at least so many bytes, and allocate it."""
        blocks = self._pool_blocks(needs, least)
        cache = KVCache(self._runner.groups, blocks, self.block_size, self.prefix_cache)
        limit = min(self.config.max_positions, cache.capacity(self.max_batch_tokens))
        if limit < 1:
            raise EngineError(
                f"a KV pool of {blocks} blocks is too small for one token; raise kv_memory"
            )
        self.max_positions = limit
        self._runner.allocate(blocks, self.block_size, limit)
        self._scheduler = Scheduler(cache, self.max_batch_size, self.max_batch_tokens)
        self.stats.kv_blocks = blocks - 1
        self.stats.kv_bytes = blocks * self._runner.block_bytes(self.block_size)

    def finish(self) -> None:
        """Give weights and KV memory back. The engine can be warmed up again."""
        start = time.perf_counter()
        self._scheduler = None
        self._runner.free()
        torch.set_num_threads(self._threads)
        if self.device.type != "cpu":
            torch.cuda.empty_cache()
        self.stats.finish_s += time.perf_counter() - start

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
                for sequence in [*scheduler.running, *scheduler.waiting]:
                    scheduler.finish(sequence)
                scheduler.cache.forget_prefixes()
            self._generating = False
            self.stats.inference_s += time.perf_counter() - start

    def _step(self, scheduler: Scheduler) -> list[Completion]:
        start = time.perf_counter()
        chunks = scheduler.schedule()
        planned = time.perf_counter()
        try:
            tokens, logprobs = self._runner.run(chunks)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._back_off(chunks, scheduler, error)
            return []
        scheduler.calm()
        now = time.perf_counter()
        self._count(chunks, scheduler)
        self.stats.schedule_s += planned - start
        self.stats.model_s += now - planned
        done = []
        sampled = zip(tokens, logprobs, strict=True)
        for chunk in chunks:
            if not chunk.samples:
                continue
            token, chosen = next(sampled)
            reason = chunk.sequence.append(token, chosen, now)
            if reason is not None:
                done.append(self._complete(chunk.sequence, reason, now, scheduler))
        return done

    def _back_off(self, chunks: list[Chunk], scheduler: Scheduler, error: Exception) -> None:
        """Go on with half of a step that ran out of memory. Raises EngineError for the least."""
        count = len(chunks)
        tokens = sum(chunk.end - chunk.start for chunk in chunks)
        if not scheduler.back_off(chunks):
            raise EngineError(
                f"out of memory in a step of one token ({available_bytes(self.device)} bytes are"
                " available); lower --kv-memory, or use a smaller model or --dtype"
            ) from error
        self.stats.back_offs += 1
        # The tensors of the failed step live as long as the frames in its traceback.
        traceback.clear_frames(error.__traceback__)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._notice(
            f"out of memory in a step of {count} requests and {tokens} tokens; going on with at"
            f" most {scheduler.max_batch_size} and {scheduler.max_batch_tokens}"
        )

    def _complete(
        self, sequence: Sequence, reason: FinishReason, now: float, scheduler: Scheduler
    ) -> Completion:
        scheduler.finish(sequence)
        completion = sequence.completion(reason, now)
        self.stats.prompt_tokens += completion.prompt_tokens
        self.stats.cached_tokens += completion.cached_tokens
        self.stats.output_tokens += len(completion.token_ids)
        return completion

    def _count(self, chunks: list[Chunk], scheduler: Scheduler) -> None:
        stats = self.stats
        stats.steps += 1
        stats.batch_sum += len(chunks)
        stats.peak_batch = max(stats.peak_batch, len(chunks))
        stats.peak_kv_blocks = max(stats.peak_kv_blocks, scheduler.cache.num_used)
        stats.preemptions = scheduler.preemptions
        decoded = [chunk.end for chunk in chunks if chunk.end - chunk.start == 1]
        stats.decode_tokens += len(decoded)
        stats.decode_context += sum(decoded)
        computed = len(decoded)
        for chunk in chunks[len(decoded) :]:  # single tokens come first
            computed += chunk.end - chunk.start
            stats.prefill_chunks += 1
            stats.prefill_tokens += chunk.end - chunk.start
            stats.prefill_context += chunk.end
        limits = scheduler.max_batch_size, scheduler.max_batch_tokens
        if len(scheduler.running) < limits[0] and computed < limits[1]:
            if scheduler.waiting:
                stats.kv_full_steps += 1
            else:
                stats.short_steps += 1

    def _sequence(self, request: Request, scheduler: Scheduler) -> Sequence | Completion:
        """A queued form of the request, or the completion that says why it cannot run."""
        now = time.perf_counter()
        params = request.params
        limit = min(self.max_positions, params.max_positions or self.max_positions)
        problem = _problem(request, limit, self.config.vocab_size)
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
        own = frozenset[int]() if params.ignore_eos else self.config.stop_ids
        return Sequence(
            request,
            list(request.prompt_ids),
            limit,
            own | params.stop_ids,
            scheduler.cache.new_tables(),
            now,
            logprobs=None if params.logprobs is None else [],
        )

    def _check_memory(self, needs: Needs, kv: int) -> None:
        """Raise EngineError, with the arithmetic, if a run would need more than there is."""
        available = available_bytes(self.device)
        given = self.kv_memory is not None
        shortage = needs.shortage(kv, given, available, self.device, self.dtype)
        if shortage is not None:
            raise EngineError(shortage)

    def _pool_blocks(self, needs: Needs, least: int) -> int:
        """Blocks of the KV pool: what memory allows, but no more than the batch can ever use."""
        block = self._runner.block_bytes(self.block_size)
        if self.kv_memory is not None:
            if self.kv_memory < least:
                raise EngineError(
                    f"kv_memory of {self.kv_memory} bytes holds {self.kv_memory // block} blocks of"
                    f" {block} bytes; at least {least} bytes are needed"
                )
            return self.kv_memory // block
        loaded = replace(needs, weights=0)
        self._check_memory(loaded, least)
        # On a CPU the rest of the machine needs memory too, and untouched blocks cost nothing.
        share = 0.4 if self.device.type == "cpu" else 0.9
        left = available_bytes(self.device) - loaded.total
        affordable = max(least, int(left * share)) // block
        per_sequence = -(-self.config.max_positions // self.block_size) * len(self._runner.groups)
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


def _problem(request: Request, limit: int, vocab_size: int) -> str | None:
    """Why a request cannot run, in one sentence."""
    ids = request.prompt_ids
    if not len(ids):
        return "the prompt is empty"
    if len(ids) >= limit:
        return (
            f"the prompt has {len(ids)} tokens, which leaves no room for output within the limit"
            f" of {limit} positions"
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        return f"the prompt has token ids outside the vocabulary of {vocab_size}"
    return None


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EngineError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineError(f"device {name!r} does not exist: torch sees {torch.cuda.device_count()}")
    return device


def choose_dtype(name: str, own: str, device: torch.device) -> torch.dtype:
    """The dtype that `name` stands for where the checkpoint has `own`. Raises EngineError."""
    if name == "auto":
        # float16 is slow on CPUs, and bfloat16 has at least its range.
        name = "bfloat16" if own == "float16" and device.type == "cpu" else own
    if name not in _DTYPES:
        raise EngineError(f"dtype must be auto, {', '.join(_DTYPES)}, not {name!r}")
    return _DTYPES[name]


def _at_least_1(name: str, value: int | None, default: int) -> int:
    value = default if value is None else value
    if value < 1:
        raise EngineError(f"{name} must be 1 or more, not {value}")
    return value
