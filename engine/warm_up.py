"""The end of warm-up, once the weights are loaded: KV cache, captured steps, step loop."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from engine.errors import EngineError
from engine.execution.capture_fallback import capture_if_possible
from engine.memory_plan import BlockCost, MemoryPlan, pool_blocks, snapshot_count
from engine.scheduling.kv_cache import KVCache
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import MAX_DRAFT_TOKENS, Speculation
from engine.scheduling.state_cache import StateCache
from engine.step_loop import StepLoop

if TYPE_CHECKING:
    from engine.engine import Engine


def prepare(engine: "Engine", plan: MemoryPlan, cost: BlockCost) -> StepLoop:
    """Allocate the KV cache, capture decode steps and create the step loop.

    Sets `max_positions` of the engine. Raises EngineError if the KV cache is too small.
    """
    settings, config, runner = engine.settings, engine.config, engine.runner
    # Steps are read before the next is scheduled only without lookahead.
    # A wrong draft token cannot be taken back from the state of a recurrent layer.
    has_states = bool(engine.model_config.recurrent_layers)
    may_speculate = config.speculation and not engine.lookahead and not has_states
    rows = engine.max_batch_size + (MAX_DRAFT_TOKENS if may_speculate else 0)
    if engine.device.type == "cuda":
        plan = _measured(engine, plan, rows)
    crash = engine.capture_crash  # found before the KV cache takes the memory
    snapshots = 0
    if has_states and config.prefix_cache:
        snapshots = snapshot_count(plan, cost, settings, engine.available_bytes())
        plan = replace(plan, states=plan.states + snapshots * cost.state_bytes)
    blocks = pool_blocks(plan, cost, settings, engine.available_bytes())
    # Rows of states: those of sequences, one of padding, snapshots.
    states = StateCache(rows + 1, snapshots) if has_states else None
    cache = KVCache(runner.groups, blocks, settings.block_size, config.prefix_cache, states)
    limit = min(engine.model_config.max_positions, cache.capacity(engine.max_batch_tokens))
    if limit < 1:
        raise EngineError(
            "the KV cache holds {blocks} blocks, too few for one token; raise {kv_memory}",
            blocks=blocks,
        )
    engine.max_positions = limit
    runner.allocate(blocks, settings.block_size, limit, rows, snapshots)
    # Admission in groups pays only if decode steps are replayed.
    group_size = engine.group_size if _capture(engine, crash) else 0
    # How many draft tokens a step computes depends on measured times, so the results of a row must
    # not depend on the other rows. Where values are rounded to 16 or 8 bits, also in the KV cache,
    # only native kernels ensure that; steps are recorded if they use nothing else.
    is_exact = engine.dtype == torch.float32 and engine.kv_dtype == "float32"
    speculates = may_speculate and (is_exact or runner.captured)
    engine.stats.kv_blocks = blocks - 1
    engine.stats.kv_bytes = blocks * cost.block_bytes
    scheduler = Scheduler(
        cache,
        engine.max_batch_size,
        engine.max_batch_tokens,
        group_size,
        Speculation(engine.max_batch_size) if speculates else None,
    )
    return StepLoop(scheduler, runner, settings, engine.stats, engine.notice, engine.lookahead)


def _measured(engine: "Engine", plan: MemoryPlan, rows: int) -> MemoryPlan:
    """The plan with what a GPU's largest steps allocate, where at most `rows` rows decode.

    Running them compiles the kernels as well.
    """
    start, runner = time.perf_counter(), engine.runner
    step = _peak_bytes(
        engine.device,
        runner.run_peak_step,
        engine.max_batch_size,
        engine.max_batch_tokens,
        min(engine.model_config.max_positions, engine.max_batch_tokens),
        engine.settings.block_size,
    )
    end = _peak_bytes(engine.device, runner.run_peak_end, rows)
    engine.stats.compile_s += time.perf_counter() - start
    return plan.measured(step, end, engine.settings)


def _peak_bytes(device: torch.device, run: Callable[..., None], *sizes: int) -> int:
    """The most bytes that a function has allocated on the GPU at any time."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run(*sizes)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


def _capture(engine: "Engine", crash: str) -> bool:
    """Capture decode steps and count the time. False, with a notice, if they cannot be.

    crash: why a capture must not be tried, from `crash_of_hip`; "" if it may be.
    """
    if crash:
        engine.notice(f"decode steps are not replayed as graphs: {crash}")
        return False
    make_capture, stats = engine.make_capture, engine.stats
    if make_capture is None:
        if engine.tensor_parallel == 1:  # exchanges between ranks cannot be recorded
            engine.runner.record()
        return True
    start, compiled = time.perf_counter(), stats.compile_s
    captured = capture_if_possible(
        engine.runner, lambda: make_capture(stats), engine.notice, engine.max_batch_tokens
    )
    compiling = stats.compile_s - compiled
    stats.capture_s += time.perf_counter() - start - compiling
    return captured
