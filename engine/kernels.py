"""Which kernels an engine runs with: checked on its device, remembered, and timed for long jobs.

With tensor parallelism rank 0 decides for all ranks: they must round alike, their devices are of
one kind, and every rank's share of the model has the same shapes. So another rank would find the
same, at the cost of the same time, or different times, which could not be used.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from engine.stats import EngineStats
from model.checks.case import ReferenceFailedError
from model.checks.kernel_cache import remember, remembered
from model.checks.prove import MEASURED, Kernels, Proof, Timing, measure, prove
from model.ops.backend import Backend

if TYPE_CHECKING:
    from engine.engine import Engine

LONG_JOB_S = 60.0
"""From which expected time on candidates are timed: they take about ten seconds, once."""


def choose_kernels(
    engine: "Engine", preferred: Mapping[str, Any] | None, expected_s: float | None
) -> Kernels:
    """Return the kernels of an engine, before it loads weights; arguments as those of the engine.

    Says once for each kernel that is wrong here what serves instead.
    """
    backend = engine.runner.backend
    if not _is_known(backend, preferred):
        preferred = None  # the job then says that it cannot continue with the same rounding
    if not engine.checks_kernels:
        return Kernels(preferred or {})
    if engine.device.type == "cuda" and engine.device.index is not None:
        torch.cuda.set_device(engine.device)
    capture = None if engine.make_capture is None else engine.make_capture(EngineStats())
    proof = Proof(
        backend, engine.model_config, engine.runner.shard, engine.settings.block_size, capture
    )
    is_long = preferred is None and expected_s is not None and expected_s >= LONG_JOB_S
    try:
        kernels = _decide(proof, preferred, is_long)
    except torch.OutOfMemoryError:
        engine.notice(
            "there is not enough free memory on the GPU to check its kernels: they are used as "
            "they are"
        )
        return Kernels(preferred or {})
    except ReferenceFailedError as error:
        engine.notice(f"the kernels cannot be checked on this GPU: {error}")
        return Kernels(preferred or {})
    finally:
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
    for op, wrong in kernels.replaced.items():
        choice = kernels.choices.get(op)
        instead = "the table's kernel" if choice is None else backend.describe_choice(op, choice)
        engine.notice(
            f"the kernel of {op} is wrong on this GPU ({wrong}); used instead: "
            f"{instead.removeprefix(f'{op}: ')}"
        )
    return kernels


def _is_known(backend: Backend, choices: Any) -> bool:
    try:
        backend.with_choices(choices or {})
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def _decide(proof: Proof, preferred: Mapping[str, Any] | None, is_long: bool) -> Kernels:
    known = remembered(proof)
    if preferred is not None:
        if known is not None and known.choices == preferred:
            return known
        kernels = prove(proof, preferred)
        if known is None:  # else this job's choices are not the best that is known here
            remember(proof, kernels)
        return kernels
    kernels = known or prove(proof)
    if is_long and not set(MEASURED) <= set(kernels.measured):
        kernels = measure(proof, kernels, _timing(proof.backend.device))
    if kernels != known:
        remember(proof, kernels)
    return kernels


def _timing(device: torch.device) -> Timing:
    if device.type != "cuda":
        return Timing(time.perf_counter)

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return Timing(clock, cache_bytes=torch.cuda.get_device_properties(device).L2_cache_size)


def described(backend: Backend, kernels: Kernels) -> tuple[str, ...]:
    """Return the kernels that are not the table's in words, and what was wrong with the others."""
    texts = []
    for op in {**kernels.choices, **kernels.replaced}:
        choice = kernels.choices.get(op)
        text = f"{op}: the table's" if choice is None else backend.describe_choice(op, choice)
        wrong = kernels.replaced.get(op)
        texts.append(text if wrong is None else f"{text} (instead of a wrong one: {wrong})")
    return tuple(texts)
