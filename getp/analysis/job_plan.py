"""Mode plan with `-i`: how long a file of prompts takes on each GPU, and its price.

A job is modelled as full prefill steps, then decode steps with the batch sizes that follow from
the output lengths, at the mean context. Each step is bounded as in `model.cost.roofline`, with
compute and memory slowed down by an efficiency; scheduling, sampling and other host time are not
included. On this machine's CPU a step takes its time at the measured rates of kernels, which
include them. Several GPUs use tensor parallelism, replicas or both.
"""

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from heapq import heapreplace
from typing import TYPE_CHECKING, Any

from getp.analysis.lookup import LOCAL, Model
from getp.analysis.step_plan import check_split
from getp.errors import GetpError
from model.cost.batch_limits import (
    CPU_BATCH_SIZE,
    cpu_batch_tokens,
    default_batch_size,
    default_batch_tokens,
)
from model.cost.devices import Device
from model.cost.operations import check_tensor_parallel
from model.cost.roofline import bound_step, largest_batch
from model.cost.workload import Workload, kv_dtype
from model.ops.specs import COMPRESSED_ROWS, STEPS_BEFORE_COPIES

if TYPE_CHECKING:
    from getp.analysis.job_requests import Requests

ASSUMED_EFFICIENCY = 0.7  # share of datasheet peak FLOP/s and bandwidth that good kernels reach
ASSUMED = "assumed"


@dataclass(frozen=True)
class Efficiency:
    """The expected shares of peak FLOP/s and bandwidth, and their source."""

    compute: float
    memory: float
    source: str
    at_rates: bool = False  # the device has measured rates of kernels, which need no efficiency


@dataclass(frozen=True, eq=False)  # hashed by identity, for the caches below
class Job:
    """Lengths in tokens, in the order in which the requests run: prompts and allowed outputs."""

    prompts: Sequence[int]
    outputs: Sequence[int]
    refused: int = 0  # requests that mode getp refuses, or that have no room for output

    @property
    def prompt_tokens(self) -> int:
        """Return the sum of the prompt lengths."""
        return sum(self.prompts)

    @property
    def output_tokens(self) -> int:
        """Return the sum of the allowed output lengths."""
        return sum(self.outputs)


@dataclass(frozen=True)
class Limits:
    """The engine's limits; None: those that mode getp chooses for the GPU."""

    max_batch_size: int | None = None
    max_batch_tokens: int | None = None
    tensor_parallel: int = 1

    def on(self, device: Device, model: Model, dtype: str) -> tuple[int, int]:
        """Return the requests and the tokens of a step on a device."""
        if device.rates is not None:
            size = self.max_batch_size or CPU_BATCH_SIZE
            return size, self.max_batch_tokens or cpu_batch_tokens(model.config)
        ranks = self.tensor_parallel
        size = self.max_batch_size or default_batch_size(model.config, dtype, device.memory, ranks)
        return size, self.max_batch_tokens or default_batch_tokens(size)


@dataclass(frozen=True)
class Prediction:
    """A job on one kind of device; `seconds` is None where the model does not fit."""

    name: str
    efficiency: Efficiency
    max_batch_size: int
    max_batch_tokens: int
    prefill_steps: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_s: float = 0.0
    decode_bound: str | None = None
    mean_batch: float = 0.0
    ttft_s: float = 0.0  # time to first token: of a prefill step
    per_token_s: float = 0.0  # mean time per output token: of a decode step
    seconds: float | None = None
    tok_s: float | None = None
    price: float | None = None
    tensor_parallel: int = 1
    replicas: int = 1
    link_s: float = 0.0  # the part of `seconds` spent on communication between GPUs


def make_job(requests: "Requests", max_positions: int) -> Job:
    """Return the job in which the output of every request reaches its limit. Raises GetpError.

    max_positions: of the model. The requests are in the order of `getp.job.ordering`: longest given
    output limit first.
    """
    fitting = []
    for prompt, max_new_tokens, max_tokens in zip(
        requests.prompts, requests.limits, requests.max_lengths, strict=True
    ):
        limit = min(max_positions, max_tokens or max_positions)
        if 0 < prompt < limit:
            given = min(max_new_tokens or limit, max_tokens - prompt if max_tokens else limit)
            fitting.append((given, prompt, min(limit - prompt, max_new_tokens or limit)))
    count = len(requests.prompts) + requests.refused
    if not fitting:
        limit = min([max_positions, *filter(None, requests.max_lengths)])
        raise GetpError(
            "no request leaves room for output within the limit of {limit} tokens "
            "({max_positions}, or the model's limit); requests: {count}",
            limit=limit,
            count=count,
        )
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
    """Predict a job on GPUs of one kind at `price` per GPU-hour.

    With replicas, the time is that of the slowest one. Raises UsageProblem for an impossible split.
    """
    check_split(model, limits.tensor_parallel)
    share = _share(job, replicas) if replicas > 1 else job
    one = _predict_engine(model, share, device, dtype, limits, efficiency)
    if one.seconds is None:
        return replace(one, replicas=replicas)
    gpus = limits.tensor_parallel
    return replace(
        one,
        replicas=replicas,
        tok_s=job.output_tokens / one.seconds,
        price=None if price is None else price * gpus * one.seconds / 3600 * replicas,
    )


def _predict_engine(
    model: Model, job: Job, device: Device, dtype: str, limits: Limits, efficiency: Efficiency
) -> Prediction:
    """Predict a job on one engine, without its price."""
    parts, count = limits.tensor_parallel, len(job.prompts)
    mean_length = round((job.prompt_tokens + job.output_tokens) / count)
    room = largest_batch(model.config, Workload("decode", 1, 1, mean_length, dtype, parts), device)
    max_size, max_tokens = limits.on(device, model, dtype)
    if room < 1:
        return Prediction(device.name, efficiency, max_size, max_tokens, tensor_parallel=parts)
    max_batch = min(count, room, max_size)
    mean_prompt = max(1, round(job.prompt_tokens / count))
    batch = min(max_batch, max(1, max_tokens // mean_prompt))
    prefill = Workload("prefill", batch, mean_prompt, mean_prompt, dtype, parts, causal=True)
    first = _step_time(model, prefill, device, efficiency)
    prefill_s, link_s = first.seconds * count / batch, first.link_s * count / batch
    decoded = job.output_tokens - count  # the prefill produces the first token of each request
    decode_steps, decode_s = 0, 0.0
    bounds: defaultdict[str, float] = defaultdict(float)  # seconds of decode steps by their limit
    early = STEPS_BEFORE_COPIES if max_size > COMPRESSED_ROWS else 0
    for number, tokens in decode_batches(job, max_batch) if decoded else ():
        mean_batch, context = max(1, round(tokens / number)), _mean_context(job)
        decode = Workload("decode", mean_batch, 1, context, dtype, parts)
        slow = 0  # steps of few rows, before there are copies of weights
        if device.rates is not None and mean_batch <= device.rates.copied_rows:
            slow = min(number, early)
            early -= slow
        for steps, at in ((slow, _without_copies(device)), (number - slow, device)):
            if not steps:
                continue
            step = _step_time(model, decode, at, efficiency)
            decode_steps += steps
            decode_s += step.seconds * steps
            link_s += step.link_s * steps
            bounds[step.limit] += step.seconds * steps
    seconds = prefill_s + decode_s
    return Prediction(
        name=device.name,
        efficiency=efficiency,
        max_batch_size=max_size,
        max_batch_tokens=max_tokens,
        prefill_steps=-(-count // batch),
        prefill_s=prefill_s,
        decode_steps=decode_steps,
        decode_s=decode_s,
        decode_bound=max(bounds, key=bounds.__getitem__, default=None),
        mean_batch=decoded / max(1, decode_steps),
        ttft_s=first.seconds,
        per_token_s=decode_s / max(1, decode_steps),
        seconds=seconds,
        tok_s=job.output_tokens / seconds,
        tensor_parallel=parts,
        link_s=link_s,
    )


def _without_copies(device: Device) -> Device:
    """Return the device as it is before a run has made compressed copies of weights."""
    return device if device.rates is None else replace(device, rates=device.rates.without_copies())


@dataclass(frozen=True)
class _StepTime:
    seconds: float  # communication included
    link_s: float  # of communication
    limit: str  # compute, memory, launch or link


def _step_time(model: Model, work: Workload, device: Device, efficiency: Efficiency) -> _StepTime:
    """Return the time of one step at the given efficiency."""
    found = bound_step(model.config, work, device)
    compute, memory = found.compute_s / efficiency.compute, found.memory_s / efficiency.memory
    longest = max(compute, memory, found.launch_s)
    limit = "compute" if longest == compute else "memory" if longest == memory else "launch"
    own = longest if found.measured_s is None else found.measured_s
    link_s = found.link_s
    return _StepTime(own + link_s, link_s, "link" if link_s > own else limit)


@lru_cache
def _share(job: Job, replicas: int) -> Job:
    return Job(job.prompts[::replicas], job.outputs[::replicas])


@lru_cache
def decode_batches(job: Job, slots: int) -> list[tuple[int, int]]:
    """Return (steps, tokens) of the decode steps, similar batch sizes grouped together.

    Each request starts in the slot that becomes free first. All slots are therefore in use until
    the last request has started; then their number decreases.
    """
    ends = [0] * slots  # the decode step at which each slot becomes free
    full = 0
    for output in job.outputs:
        full = ends[0]
        heapreplace(ends, full + output - 1)  # the prefill produces the first token
    found: dict[int, tuple[int, int]] = {}
    previous = 0
    for batch, end in [(slots, full), *zip(range(slots, 0, -1), sorted(ends), strict=True)]:
        steps, tokens = found.get(batch.bit_length(), (0, 0))
        more = end - previous
        found[batch.bit_length()] = steps + more, tokens + more * batch
        previous = end
    return [(steps, tokens) for steps, tokens in found.values() if steps]


@lru_cache
def _mean_context(job: Job) -> int:
    """Return the mean context over all decoded tokens."""
    tokens = positions = 0
    for prompt, output in zip(job.prompts, job.outputs, strict=True):
        more = output - 1  # at contexts prompt + 1 to prompt + more, the token itself included
        tokens += more
        positions += more * prompt + more * (more + 1) // 2
    return max(1, round(positions / tokens))


def efficiency_of(device: Device, dtype: str, model: Model) -> Efficiency:
    """Return the efficiency of a device: measured on this machine, if it has one, or assumed.

    The last run of the model on this machine takes precedence over its measured peaks, which count
    as fully reached. Measured rates of kernels need neither.
    """
    from model.cost.measure import cached_device, recorded_efficiency

    if device.rates is not None:
        return Efficiency(1.0, 1.0, device.source, at_rates=True)
    run = recorded_efficiency(device, model.name)
    if run is not None:
        share, date = run
        return Efficiency(share, share, f"reached by the last run of {model.name} here, {date}")
    if device.name == LOCAL:
        return Efficiency(1.0, 1.0, f"peaks {device.source}, assumed to be reached by every step")
    found = cached_device()
    if found is not None and found.is_a(device):
        computed = found.device.computes_in(dtype)
        compute = min(1.0, found.device.peak(computed) / device.peak(computed))
        memory = min(1.0, found.device.bandwidth / device.bandwidth)
        return Efficiency(compute, memory, f"peaks {found.device.source}")
    return Efficiency(ASSUMED_EFFICIENCY, ASSUMED_EFFICIENCY, ASSUMED)


def layouts(model: Model, gpus: int) -> list[tuple[int, int]]:
    """Return each (tensor_parallel, replicas) of that many GPUs, largest tensor_parallel first.

    Raises UsageProblem if the model cannot be split over all of them.
    """
    check_split(model, gpus)
    found = []
    for parts in range(gpus, 0, -1):
        with contextlib.suppress(ValueError):
            check_tensor_parallel(model.config, parts)
            if gpus % parts == 0:
                found.append((parts, gpus // parts))
    return found


def as_json(
    model: Model, job: Job, dtype: str, limits: Limits, predictions: Sequence[Prediction]
) -> dict[str, Any]:
    """Return the predictions for `--format json`."""
    return {
        "model": model.name,
        "dtype": dtype,
        "kv_dtype": kv_dtype(model.config, dtype),
        "quantization": model.config.quantization,
        "requests": len(job.prompts),
        "requests_refused": job.refused,
        "prompt_tokens": job.prompt_tokens,
        "output_tokens": job.output_tokens,
        **asdict(limits),
        "gpus": [asdict(prediction) for prediction in predictions],
    }
