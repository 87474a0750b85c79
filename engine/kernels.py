"""The choice of an engine's kernels: checked on its device, stored, and timed before long jobs.

With tensor parallelism rank 0 chooses for all ranks. They must use the same kernels, so that they
round alike, and their devices and the shapes of their shares of the model are the same.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from engine.stats import EngineStats
from model.checks.case import ReferenceFailedError
from model.checks.kernel_cache import remember, remembered
from model.checks.verify import MEASURED, Kernels, Timing, Verifier, measure, verify
from model.ops.backend import Backend

if TYPE_CHECKING:
    from engine.engine import Engine

LONG_JOB_S = 60.0
"""Before a job expected to take this long or longer, candidates are timed for ten seconds, once."""


def choose_kernels(
    engine: "Engine", preferred: Mapping[str, Any] | None, expected_s: float | None
) -> Kernels:
    """Return the kernels of an engine, before it loads weights; arguments as those of the engine.

    A notice names each kernel that fails its check, and its replacement.
    """
    backend = engine.runner.backend
    if not _is_known(backend, preferred):
        preferred = None  # the job then says that it cannot continue with the same rounding
    if not engine.checks_kernels:
        return Kernels(preferred or {})
    if engine.device.type == "cuda" and engine.device.index is not None:
        torch.cuda.set_device(engine.device)
    capture = None
    if engine.make_capture is not None and not engine.capture_crash:
        capture = engine.make_capture(EngineStats())
    verifier = Verifier(
        backend, engine.held_config, engine.runner.shard, engine.settings.block_size, capture
    )
    is_long = preferred is None and expected_s is not None and expected_s >= LONG_JOB_S
    try:
        kernels = _decide(verifier, preferred, is_long)
    except torch.OutOfMemoryError:
        engine.notice(
            "the kernels are used unchecked: the GPU does not have enough free memory to check them"
        )
        return Kernels(preferred or {})
    except ReferenceFailedError as error:
        engine.notice(f"the kernels are used unchecked: {error}")
        return Kernels(preferred or {})
    finally:
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
    for op, wrong in kernels.replaced.items():
        choice = kernels.choices.get(op)
        instead = "the default kernel" if choice is None else backend.describe_choice(op, choice)
        engine.notice(
            f"the kernel of {op} failed its check on this GPU ({wrong}); used instead: "
            f"{instead.removeprefix(f'{op}: ')}"
        )
    return kernels


def _is_known(backend: Backend, choices: Any) -> bool:
    try:
        backend.with_choices(choices or {})
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def _decide(verifier: Verifier, preferred: Mapping[str, Any] | None, is_long: bool) -> Kernels:
    known = remembered(verifier)
    if preferred is not None:
        if known is not None and known.choices == preferred:
            return known
        kernels = verify(verifier, preferred)
        if known is None:  # else better choices than this job's are stored
            remember(verifier, kernels)
        return kernels
    kernels = known or verify(verifier)
    if is_long and not set(MEASURED) <= set(kernels.measured):
        kernels = measure(verifier, kernels, _timing(verifier.backend.device))
    if kernels != known:
        remember(verifier, kernels)
    return kernels


def _timing(device: torch.device) -> Timing:
    if device.type != "cuda":
        return Timing(time.perf_counter)

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return Timing(clock, cache_bytes=torch.cuda.get_device_properties(device).L2_cache_size)


def described(backend: Backend, kernels: Kernels) -> tuple[str, ...]:
    """Return the kernels other than the defaults in words, and why others failed."""
    texts = []
    for op in {**kernels.choices, **kernels.replaced}:
        choice = kernels.choices.get(op)
        text = f"{op}: default kernel" if choice is None else backend.describe_choice(op, choice)
        wrong = kernels.replaced.get(op)
        texts.append(text if wrong is None else f"{text} (instead of one that failed: {wrong})")
    return tuple(texts)
