"""Verify and choose kernels on the device that runs them, before a model is loaded.

A kernel that computes wrong results on a device would cost a user the whole job, and the default
tiles were chosen without access to every device. So each operation's kernel runs the cases of
`model.checks`. One that fails is replaced by the next candidate, or by plain torch if all of them
fail. Then candidates may be timed. The clock and the capture are arguments, so that this also runs
without a GPU.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from model.checks.case import (
    Capture,
    Case,
    ReferenceFailedError,
    problem,
    reference_of,
)
from model.checks.cases import cases
from model.config import ModelConfig
from model.ops.backend import OPERATIONS, Backend
from model.sharding import ALONE, Shard

_MARGIN = 0.03  # a candidate must be faster than the kernel in use by more than this
_MOST_COPIES = 8
_RUNS = 3  # the fastest counts
_LONG_ENOUGH_S = 1e-3  # for a run to hide the clock's resolution and the launch
# In this order operations are measured until the time is up: those that can gain most come first.
_BY_GAIN = (
    "experts",
    "attention",
    "norm_experts",
    "norm_mlp",
    "norm_qkv",
    "linear",
    "logits",
    "sample_rows",
)
MEASURED = (*_BY_GAIN, *(op for op in OPERATIONS if op not in _BY_GAIN))


@dataclass(frozen=True)
class Kernels:
    """The kernels that an engine uses instead of the defaults."""

    choices: Mapping[str, Any] = field(default_factory=dict)  # by operation: `kernel_choices`
    replaced: Mapping[str, str] = field(default_factory=dict)  # operation → problem of its kernel
    measured: tuple[str, ...] = ()  # operations whose candidates were timed


@dataclass(frozen=True)
class Timing:
    """How candidates are timed."""

    clock: Callable[[], float]  # seconds; waits for the device first
    budget_s: float = 10.0  # for all of them, their compilation included
    cache_bytes: int = 0  # of the device's largest cache: inputs must not stay in it


@dataclass(frozen=True)
class Verifier:
    """Compares kernels with plain torch, for one rank's share of a model on a backend."""

    backend: Backend  # the default kernels
    config: ModelConfig
    shard: Shard = ALONE
    block_size: int = 16
    capture: Capture | None = None

    def cases(self, op: str) -> list[Case]:
        """Return the cases of an operation; none if the model does not use it."""
        backend = self.backend
        return list(
            cases(
                self.config,
                backend.device,
                backend.dtype,
                kv_dtype=backend.kv_dtype,
                shard=self.shard,
                block_size=self.block_size,
                operations=[op],
            )
        )

    def problem(self, found: list[Case], choices: Mapping[str, Any]) -> str | None:
        """Return the first problem of the given cases with these choices."""
        backend, reference = self.backend.with_choices(choices), reference_of(self.backend)
        for case in found:
            capture = self.capture if case.is_timed or case is found[0] else None
            wrong = problem(case, backend, reference, capture)
            if wrong is not None:
                return f"{case.label}: {wrong}"
        return None


@torch.inference_mode()
def verify(verifier: Verifier, preferred: Mapping[str, Any] | None = None) -> Kernels:
    """Return kernels that pass: for each operation the preferred one, the default or a candidate.

    preferred: choices to try before the default ones. Raises ValueError if the backend does not
    know them, ReferenceFailedError and torch.OutOfMemoryError.
    """
    verifier.backend.with_choices(preferred or {})
    choices: dict[str, Any] = {}
    replaced: dict[str, str] = {}
    for op in OPERATIONS:
        candidates = verifier.backend.kernel_choices(op)
        found = verifier.cases(op) if candidates else []
        if not found:
            continue
        *others, last = candidates
        first = (preferred or {}).get(op)
        if first == last:
            choices[op] = last
            continue
        order = [None, *others] if first is None else [first, None, *others]
        wrong = None
        for candidate in order:
            tried = choices if candidate is None else {**choices, op: candidate}
            try:
                why = verifier.problem(found, tried)
            except ReferenceFailedError as error:
                if wrong is None:
                    raise
                # After an invalid memory access the device is unusable.
                raise ReferenceFailedError(f"{error}, after {op} failed: {wrong}") from error
            if why is None:
                choices = dict(tried)
                break
            wrong = wrong or why
        else:
            choices[op] = last
        if wrong is not None:
            replaced[op] = wrong
    return Kernels(choices, replaced)


@torch.inference_mode()
def measure(verifier: Verifier, kernels: Kernels, timing: Timing) -> Kernels:
    """Return the kernels with candidates that are faster and pass.

    Each candidate changes one thing and is tried in addition to those kept before; it is kept if it
    is faster by more than the margin, on average over the timed cases. Operations that were
    measured before, or for which no time is left, do not change. Raises ReferenceFailedError and
    torch.OutOfMemoryError.
    """
    end = timing.clock() + timing.budget_s
    for op in MEASURED:
        *candidates, last = verifier.backend.kernel_choices(op) or [None]
        if op in kernels.measured or last is None or kernels.choices.get(op) == last:
            continue
        choices, is_complete = _fastest(verifier, op, candidates, kernels.choices, timing, end)
        kernels = replace(kernels, choices=choices)
        if not is_complete:
            break
        kernels = replace(kernels, measured=(*kernels.measured, op))
    return kernels


def _fastest(
    verifier: Verifier,
    op: str,
    candidates: list[Mapping[str, Any]],
    choices: Mapping[str, Any],
    timing: Timing,
    end: float,
) -> tuple[Mapping[str, Any], bool]:
    """Return the choices with the fastest one of an operation, and whether there was enough time.

    A candidate is timed first and verified if it is faster, since verifying compiles more kernels.
    """
    found = verifier.cases(op)
    timed = [case for case in found if case.is_timed]
    if not timed or not candidates:
        return choices, True

    def share(tried: Mapping[str, Any]) -> float:
        """Return the time of these choices over that of the ones in use, a mean over the cases."""
        ratios = [
            _seconds(verifier, case, tried, timing) / _seconds(verifier, case, choices, timing)
            for case in timed
        ]
        return sum(ratios) / len(ratios)

    for candidate in candidates:
        if timing.clock() >= end:
            return choices, False
        tried = {**choices, op: {**choices.get(op, {}), **candidate}}
        try:
            is_faster = tried != choices and share(tried) < 1 - _MARGIN
        except torch.OutOfMemoryError:
            raise
        except Exception:  # such as a tile that the device has no room for
            continue
        # Timed twice, because a disturbance can make a candidate seem faster.
        if is_faster and verifier.problem(found, tried) is None and share(tried) < 1 - _MARGIN:
            choices = tried
    return choices, True


def _seconds(verifier: Verifier, case: Case, choices: Mapping[str, Any], timing: Timing) -> float:
    """Return the seconds of one call, replayed on copies that do not fit in the device's cache."""
    copies = min(_MOST_COPIES, 1 + math.ceil(timing.cache_bytes / case.bytes))
    # Weights are packed once for each backend, so several backends have several copies.
    calls = [case.prepare(verifier.backend.with_choices(choices)) for _ in range(copies)]

    def call_all() -> list[Any]:
        return [call() for call in calls]

    replay = call_all if verifier.capture is None else verifier.capture(call_all)

    def seconds(replays: int) -> float:
        start = timing.clock()
        for _ in range(replays):
            replay()
        return max(timing.clock() - start, 1e-9)

    seconds(1)
    replays = min(100, math.ceil(_LONG_ENOUGH_S / seconds(1)))
    return min(seconds(replays) for _ in range(_RUNS)) / (replays * copies)
