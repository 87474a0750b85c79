"""Mode plan with `-i`: how long a file of prompts takes on each GPU, and what that costs.

The job is taken apart into prefill steps full of prompts and decode steps at the batches that its
lengths lead to and their mean context; each step is bounded as in `model.cost.roofline`, with
compute and memory slowed by the efficiency assumed. Scheduling, sampling and the host are not in
it. Several GPUs share the model, or run replicas that share the requests, or some of both.
"""

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from heapq import heapreplace
from typing import TYPE_CHECKING, Any

from getp import tables
from getp.analysis.step_plan import LOCAL, Model
from getp.errors import GetpError, UsageProblem
from getp.limits import most_positions
from getp.units import percent, seconds
from model.cost.devices import Device
from model.cost.interconnect import exchange
from model.cost.operations import check_tensor_parallel, operations, total
from model.cost.roofline import bound, largest_batch
from model.cost.workload import Workload

if TYPE_CHECKING:
    from getp.analysis.job_requests import Requests

ASSUMED_EFFICIENCY = 0.7
"""Share of a datasheet's peak and bandwidth that good kernels reach."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's peak and bandwidth that a job is expected to reach, and why."""

    compute: float
    memory: float
    source: str


@dataclass(frozen=True, eq=False)  # what is worked out of it is remembered by its identity
class Job:
    """A job's lengths in tokens, in the order of running: prompts, and the outputs allowed."""

    prompts: Sequence[int]
    outputs: Sequence[int]
    refused: int = 0  # others: those that mode getp refuses, or that leave no room for output

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompts)

    @property
    def output_tokens(self) -> int:
        return sum(self.outputs)


@dataclass(frozen=True)
class Limits:
    """What the engine is allowed, as in mode getp."""

    max_batch_size: int = 256
    max_batch_tokens: int = 8192
    tensor_parallel: int = 1


@dataclass(frozen=True)
class Prediction:
    """A job on one device; no seconds where the model does not fit."""

    name: str
    efficiency: Efficiency
    prefill_steps: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_s: float = 0.0
    decode_bound: str | None = None
    mean_batch: float = 0.0
    seconds: float | None = None
    tok_s: float | None = None
    price: float | None = None
    tensor_parallel: int = 1
    replicas: int = 1
    link_s: float = 0.0  # of it, GPUs sending to each other


def make_job(requests: "Requests", max_positions: int, steps: int | None) -> Job:
    """Return the job in which every request's output runs to its limit. Raises GetpError.

    steps: as given with -n. Its order is that of `getp.job.ordering`: the longest outputs first, by
    the limits that are given.
    """
    fitting = []
    for prompt, asked in zip(requests.prompts, requests.limits, strict=True):
        most = most_positions(steps, asked)
        limit = min(max_positions, most or max_positions)
        if 0 < prompt < limit:
            given = min(asked or limit, most - prompt if most else limit)
            fitting.append((given, prompt, min(limit - prompt, asked or limit)))
    count = len(requests.prompts) + requests.refused
    if not fitting:
        limit = min(max_positions, most_positions(steps, None) or max_positions)
        raise GetpError(f"none of the {count} requests leaves room within {limit} positions")
    fitting.sort(key=lambda one: -one[0])
    prompts, outputs = ([one[i] for one in fitting] for i in (1, 2))
    return Job(prompts, outputs, count - len(fitting))


def predict(
    model: Model,
    job: Job,
    device: Device,
    dtype: str,
    limits: Limits,
    efficiency: Efficiency,
    price: float | None = None,
    replicas: int = 1,
) -> Prediction:
    """Predict a job on GPUs of a kind at `price` an hour each, on the longest of the replicas.

    Raises UsageProblem for a bad split.
    """
    if replicas > 1:
        one = predict(model, _share(job, replicas), device, dtype, limits, efficiency, price)
        if one.seconds is None:
            return replace(one, replicas=replicas)
        return replace(
            one,
            replicas=replicas,
            tok_s=job.output_tokens / one.seconds,
            price=None if one.price is None else one.price * replicas,
        )
    config, count, parts = model.config, len(job.prompts), limits.tensor_parallel
    try:
        check_tensor_parallel(config, parts)
    except ValueError as error:
        raise UsageProblem(f"--tensor-parallel: {error}") from None

    def step_time(work: Workload) -> tuple[float, str, float]:
        sent = exchange(config, work).seconds(device.link)
        found = bound(total(operations(config, work)), device, dtype, work.tokens)
        compute, memory = found.compute_s / efficiency.compute, found.memory_s / efficiency.memory
        longest = max(compute, memory, found.launch_s)
        limit = "compute" if longest == compute else "memory" if longest == memory else "launch"
        return longest + sent, "link" if sent > longest else limit, sent

    mean_prompt = max(1, round(job.prompt_tokens / count))
    longest = round((job.prompt_tokens + job.output_tokens) / count)
    room = largest_batch(config, Workload("decode", 1, 1, longest, dtype, parts), device)
    if room < 1:
        return Prediction(device.name, efficiency, tensor_parallel=parts)
    most = min(count, room, limits.max_batch_size)
    together = min(most, max(1, limits.max_batch_tokens // mean_prompt))
    prefill_steps = -(-count // together)
    prefill = Workload("prefill", together, mean_prompt, mean_prompt, dtype, parts, causal=True)
    prefill_once, _, sent = step_time(prefill)
    prefill_s, link_s = prefill_once * count / together, sent * count / together
    decoded = job.output_tokens - count  # the prefill gives each request's first token
    decode_steps, decode_s = 0, 0.0
    bounds: defaultdict[str, float] = defaultdict(float)  # seconds by what limits them
    for steps, tokens in decode_batches(job, most) if decoded else ():
        batch, context = max(1, round(tokens / steps)), _mean_context(job)
        once, limit, sent = step_time(Workload("decode", batch, 1, context, dtype, parts))
        decode_steps += steps
        decode_s += once * steps
        link_s += sent * steps
        bounds[limit] += once * steps
    whole = prefill_s + decode_s
    return Prediction(
        device.name,
        efficiency,
        prefill_steps,
        prefill_s,
        decode_steps,
        decode_s,
        max(bounds, key=bounds.__getitem__, default=None),
        decoded / max(1, decode_steps),
        whole,
        job.output_tokens / whole,
        None if price is None else price * parts * whole / 3600,
        parts,
        link_s=link_s,
    )


@lru_cache
def _share(job: Job, replicas: int) -> Job:
    return Job(job.prompts[::replicas], job.outputs[::replicas])


@lru_cache
def decode_batches(job: Job, slots: int) -> list[tuple[int, int]]:
    """Return (steps, tokens) of the decode steps, those of like batches together.

    Each request begins where a slot becomes free first. So all slots are in use until the last
    one has begun, and then fewer and fewer.
    """
    ends = [0] * slots  # decode steps after which each slot is free
    full = 0
    for output in job.outputs:
        full = ends[0]
        heapreplace(ends, full + output - 1)  # the prefill gives the first token
    found: dict[int, tuple[int, int]] = {}
    before = 0
    for batch, end in [(slots, full), *zip(range(slots, 0, -1), sorted(ends), strict=True)]:
        steps, tokens = found.get(batch.bit_length(), (0, 0))
        more = end - before
        found[batch.bit_length()] = steps + more, tokens + more * batch
        before = end
    return [(steps, tokens) for steps, tokens in found.values() if steps]


@lru_cache
def _mean_context(job: Job) -> int:
    """Return the context of a decoded token, over all of them."""
    tokens = positions = 0
    for prompt, output in zip(job.prompts, job.outputs, strict=True):
        more = output - 1  # at lengths prompt + 1 … prompt + more, the token itself counted
        tokens += more
        positions += more * prompt + more * (more + 1) // 2
    return max(1, round(positions / tokens))


def efficiency_of(device: Device, dtype: str, model: Model) -> Efficiency:
    """Return what was reached where the device is this machine's, else what is assumed.

    The last run of the model here knows best; then the peaks measured here, at full use.
    """
    from model.cost.measure import cached_device, reached

    run = reached(device, model.name)
    if run is not None:
        share, date = run
        return Efficiency(share, share, f"reached by the last run of {model.name} here, {date}")
    if device.name == LOCAL:
        return Efficiency(1.0, 1.0, f"peaks {device.source}, taken as reached by every step")
    found = cached_device()
    if found is not None and found.is_a(device):
        compute = min(1.0, found.device.peak(dtype) / device.peak(dtype))
        memory = min(1.0, found.device.bandwidth / device.bandwidth)
        return Efficiency(compute, memory, f"peaks {found.device.source}")
    return Efficiency(ASSUMED_EFFICIENCY, ASSUMED_EFFICIENCY, "assumed")


def as_json(
    model: Model, job: Job, dtype: str, limits: Limits, found: Sequence[Prediction]
) -> dict[str, Any]:
    """Return what `--format json` prints of a predicted job."""
    return {
        "model": model.name,
        "dtype": dtype,
        "requests": len(job.prompts),
        "requests_refused": job.refused,
        "prompt_tokens": job.prompt_tokens,
        "output_tokens": job.output_tokens,
        **asdict(limits),
        "gpus": [asdict(prediction) for prediction in found],
    }


def print_job(
    model: Model, job: Job, dtype: str, limits: Limits, found: Sequence[Prediction], counted: str
) -> None:
    """Print the predictions as a table on standard output."""
    console = tables.console()
    console.print(
        f"{model.name}, {dtype}: {len(job.prompts):,} requests, {job.prompt_tokens:,} prompt "
        f"tokens ({counted}), {job.output_tokens:,} output tokens at most",
        style="bold",
        soft_wrap=True,
    )
    if job.refused:
        console.print(
            f"{job.refused:,} requests are refused or leave no room for output, and are left out",
            soft_wrap=True,
        )
    priced = any(prediction.price is not None for prediction in found)
    several = any(one.tensor_parallel * one.replicas > 1 for one in found)
    numbers = ["prefill", "decode", "batch", "time", "tok/s", "efficiency"]
    table = tables.table(
        ["GPU", *(["as (sending)"] if several else []), "bound by"],
        [*numbers, *(["price"] if priced else [])],
    )
    for one in found:
        table.add_row(one.name, *([_layout(one)] if several else []), *_cells(one, priced))
    tables.show(console, table)
    console.print(_notes(found, limits), style="dim", soft_wrap=True)


def _layout(one: Prediction) -> str:
    """How the GPUs are used: as engine's and cluster's options have it."""
    parts = []
    if one.replicas > 1:
        parts.append(f"{one.replicas} replicas")
    if one.tensor_parallel > 1:
        parts.append(f"TP={one.tensor_parallel} ({percent(one.link_s / (one.seconds or 1))})")
    return " × ".join(parts) or "1 GPU"


def layouts(model: Model, gpus: int) -> list[tuple[int, int]]:
    """Every (tensor parallel, replicas) of so many GPUs that the model allows, most shared first.

    Raises UsageProblem if the model cannot be shared by all of them.
    """
    try:
        check_tensor_parallel(model.config, gpus)
    except ValueError as error:
        raise UsageProblem(f"--tensor-parallel: {error}") from None
    found = []
    for parts in range(gpus, 0, -1):
        with contextlib.suppress(ValueError):
            check_tensor_parallel(model.config, parts)
            if gpus % parts == 0:
                found.append((parts, gpus // parts))
    return found


def _cells(one: Prediction, priced: bool) -> list[str]:
    reached = f"{one.efficiency.compute:.0%}/{one.efficiency.memory:.0%}"
    if one.seconds is None or one.tok_s is None:
        return ["does not fit"]
    cells = [
        one.decode_bound or "-",
        seconds(one.prefill_s),
        seconds(one.decode_s),
        f"{one.mean_batch:,.1f}",
        seconds(one.seconds),
        f"{one.tok_s:,.0f}",
        reached,
    ]
    return [*cells, f"{one.price:,.4f}" if one.price is not None else "-"] if priced else cells


def _notes(found: Sequence[Prediction], limits: Limits) -> str:
    lines = [
        f"Every request runs to its limit; at most {limits.max_batch_size} at a time, "
        f"{limits.max_batch_tokens} tokens a step.",
        "Efficiency: share of the peak FLOP/s / of the bandwidth that is taken to be reached:",
    ]
    lines += dict.fromkeys(
        f"  {one.name if one.efficiency.source != 'assumed' else 'GPUs not measured here'}: "
        f"{one.efficiency.source}"
        for one in found
    )
    lines.append("Scheduling, sampling and the host are not counted.")
    return "\n" + "\n".join(lines)
