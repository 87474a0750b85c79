"""The bottleneck of a measured step, and changes that would help, with their predicted gains.

A change saves launches, bytes or host time, or the time of each part without its launches grows
as the cost model predicts for the part.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from getp.analysis.profile import HOST_PARTS, Component, Profile, merge_fused_ops
from getp.units import duration, percent, quantity
from model.cost.operations import operations, total
from model.cost.roofline import largest_batch, matrix_seconds
from model.cost.workload import Op, Workload

_MIN_GAIN = 0.01  # smaller gains are not listed
_MIN_DOUBLING_GAIN = 1.1  # the batch is doubled while throughput grows by this factor
# float8 is a prediction only: the engine does not compute in it.
_SMALLER = {"float32": "bfloat16", "bfloat16": "float8", "float16": "float8"}
# Parts that could become one kernel per layer (qwen2-layer-data-flow). Fusing them saves moving
# the activations of one operation: its name, and the number of times they are moved.
_FUSIONS = (
    ("norm and QKV", ("input_norm", "qkv_proj"), ("input_norm", 1)),
    ("norm and gate/up", ("post_norm", "gate_up_proj"), ("post_norm", 1)),
    ("gate/up, activation and down", ("gate_up_proj", "activation", "down_proj"),
     ("activation", 2)),
)  # fmt: skip


@dataclass(frozen=True)
class Bottleneck:
    """The limit that bounds a step, the evidence, and the seconds that each limit requires."""

    bound: str  # launch, memory, compute or host
    evidence: str
    launch_s: float
    memory_s: float
    compute_s: float
    host_s: float


@dataclass(frozen=True)
class Advice:
    """A change, and the predicted step time and throughput."""

    change: str
    step_s: float
    tok_s: float
    gain: float  # of throughput: 0.36 means 36% more tokens per second


def find_bottleneck(profile: Profile) -> Bottleneck:
    """Return the limit that bounds the step.

    Launch overhead is the idle time of the GPU within the model. A CPU does not overlap operations,
    so there it is the number of operations times the cost of starting one.
    """
    step, device = total(profile.ops), profile.device
    compute = max(
        matrix_seconds(step, device, profile.work.dtype),
        step.flops.vector / device.vector,
        step.flops.special / device.special,
    )
    required = {
        "launch": launch_seconds(profile),
        "memory": step.bytes.total / device.bandwidth,
        "compute": compute,
        "host": profile.seconds_of(*HOST_PARTS),
    }
    bound = max(required, key=lambda kind: required[kind])
    shares = {kind: percent(required[kind] / profile.step_s) for kind in required}
    kind = "kernels" if profile.on_gpu else "operations"
    how = "is GPU idle time between" if profile.on_gpu else "is spent on starting"
    sentences = {
        "launch": f"{shares['launch']} of the step {how} {profile.launches:,} {kind}",
        "memory": f"moving {quantity(step.bytes.total, 'B')} at peak bandwidth takes "
        f"{shares['memory']} of the step",
        "compute": f"computing its FLOPs at peak speed takes {shares['compute']} of the step",
        "host": f"scheduling and batch preparation take {shares['host']} of the step",
    }
    evidence = "; ".join(sorted(sentences.values(), key=lambda text: text != sentences[bound]))
    return Bottleneck(bound, evidence, *required.values())


def launch_seconds(profile: Profile) -> float:
    """Return the seconds of the step that launches take, see `find_bottleneck`."""
    if profile.busy_s is not None:
        return max(0.0, profile.step_s - profile.busy_s - profile.seconds_of(*HOST_PARTS))
    return min(profile.launches * profile.device.launch_s, profile.step_s)


def advise(profile: Profile) -> list[Advice]:
    """Return the changes that would help, largest gain first."""
    changes = [*_fusions(profile), *_host(profile), *_kernels(profile)]
    changes += [*_larger_batch(profile), *_smaller_dtype(profile)]
    return sorted((a for a in changes if a.gain >= _MIN_GAIN), key=lambda a: -a.gain)


def as_json(bottleneck: Bottleneck, advice: list[Advice]) -> dict[str, Any]:
    """Return both for `--format json`."""
    return {"verdict": asdict(bottleneck), "advice": [asdict(one) for one in advice]}


def _saving(profile: Profile, change: str, saved_s: float) -> Advice:
    step = max(profile.step_s - saved_s, profile.step_s * 1e-3)
    tok_s = profile.work.tokens / step
    return Advice(change, step, tok_s, tok_s / profile.tok_s - 1)


def _fusions(profile: Profile) -> list[Advice]:
    if not profile.launches:
        return []
    each = launch_seconds(profile) / profile.launches
    parts = {part.name: part for part in profile.components}
    advice = []
    for title, names, (moved, times) in _FUSIONS:
        before = sum(parts[name].launches for name in names)
        after = max(parts[name].op.layer_count for name in names)
        if before <= after:
            continue  # already fused
        saved = parts[moved].op.bytes.activations * times / profile.device.bandwidth
        text = f"fuse {title}: {after:,} launches instead of {before:,}"
        advice.append(_saving(profile, text, (before - after) * each + saved))
    unfused, fused = (
        total(profile.ops),
        total(_operations(profile, replace(profile.work, fused=True))),
    )
    if profile.launches <= fused.launches:
        return advice
    saved = (unfused.bytes.activations - fused.bytes.activations) / profile.device.bandwidth
    fewer = profile.launches - fused.launches
    text = f"fuse whole layers: {fused.launches:,} launches instead of {profile.launches:,}"
    return [*advice, _saving(profile, text, fewer * each + saved)]


def _host(profile: Profile) -> list[Advice]:
    """Return the changes that overlap host and GPU; none on a CPU.

    The profiled step is neither replayed nor scheduled ahead, because its parts are timed.
    """
    if not profile.on_gpu:
        return []
    host = profile.seconds_of(*HOST_PARTS)
    return [
        _saving(profile, "capture the step as a graph, as jobs do", launch_seconds(profile)),
        _saving(profile, "schedule the next step while this one runs, as jobs do", host),
    ]


def _kernels(profile: Profile) -> list[Advice]:
    """Return the gain of running the operation that exceeds its limit the most at its limit."""
    known = [part for part in profile.components if part.op.layer_count]
    limits = {part.name: _limit(profile, [part.op], profile.work.dtype) for part in known}
    worst = max(known, key=lambda part: _own_seconds(profile, part) - limits[part.name])
    own, limit = _own_seconds(profile, worst), limits[worst.name]
    if own <= limit:
        return []
    return [_saving(profile, f"a faster {worst.name}: now at {percent(limit / own)} of its limit",
                    own - limit)]  # fmt: skip


def _own_seconds(profile: Profile, part: Component) -> float:
    """Return the seconds of a part without its launches; for parts of the host, all of them."""
    seconds = profile.seconds_of(part.name)
    if part.name in HOST_PARTS:
        return seconds
    if part.busy_s is not None:
        return part.busy_s
    return max(0.0, seconds - launch_seconds(profile) * part.launches / max(1, profile.launches))


def _larger_batch(profile: Profile) -> list[Advice]:
    """Return the gain of doubling the batch for as long as that fits and is worthwhile."""
    work, max_batch = profile.work, largest_batch(profile.config, profile.work, profile.device)
    best, tok_s = work.batch, profile.tok_s
    while 2 * best <= max_batch:
        larger = replace(work, batch=2 * best)
        reached = larger.tokens / predicted_seconds(profile, larger)
        if reached < tok_s * _MIN_DOUBLING_GAIN:
            break
        best, tok_s = larger.batch, reached
    if best == work.batch:
        return []
    step = best * work.query / tok_s
    return [Advice(f"a batch of {best:,} instead of {work.batch:,}", step, tok_s,
                   tok_s / profile.tok_s - 1)]  # fmt: skip


def _smaller_dtype(profile: Profile) -> list[Advice]:
    smaller = _SMALLER[profile.work.dtype]
    if smaller not in profile.device.peaks:
        return []  # the device would convert it to a wider type, which costs time
    step = predicted_seconds(profile, replace(profile.work, dtype=smaller))
    saved_s = profile.step_s - step
    return [_saving(profile, f"weights, activations and KV cache in {smaller}", saved_s)]


def predicted_seconds(profile: Profile, work: Workload) -> float:
    """Return the seconds of another step with the same number of launches.

    The time of a part grows as that at the measured rates of kernels, where there are some, or else
    in proportion to its roofline limit. What a part takes beyond the rates, such as the time of
    Python before a kernel, remains. Of parts that the cost model does not know, sampling grows with
    the number of logits; scheduling and the like take most of their time however many there are.
    """
    ops = {op.name: op for op in _operations(profile, work)}
    step = launch_seconds(profile)
    for part in profile.components:
        seconds = _own_seconds(profile, part)
        now = later = 0.0
        if part.name == "sampling":
            now, later = (_sampling_cost(profile, each) for each in (profile.work, work))
        elif part.op.layer_count:
            now = _cost(profile, part.op, profile.work)
            later = _cost(profile, ops[part.name], work)
        explained = seconds if profile.device.rates is None else min(seconds, now)
        step += seconds + (explained * (later / now - 1) if now else 0.0)
    return step


def _sampling_cost(profile: Profile, work: Workload) -> float:
    """Return what the seconds of sampling are proportional to in different steps."""
    rates = profile.device.rates
    logits = work.logits_rows * profile.config.vocab_size
    return logits if rates is None else logits * rates.logit_s


def _operations(profile: Profile, work: Workload) -> list[Op]:
    return merge_fused_ops(operations(profile.config, work), profile.within)


def _cost(profile: Profile, op: Op, work: Workload) -> float:
    """Return what the seconds of an operation are proportional to in different steps."""
    rates = profile.device.rates
    if rates is None:
        return _limit(profile, [op], work.dtype)
    return rates.op_seconds(op, profile.config, work)


def _limit(profile: Profile, ops: list[Op], dtype: str) -> float:
    """Return the seconds of the operations in sequence, each at its roofline limit."""
    device = profile.device
    return sum(
        max(
            matrix_seconds(op, device, dtype),
            op.flops.vector / device.vector,
            op.flops.special / device.special,
            op.bytes.total / device.bandwidth,
        )
        for op in ops
    )


def unexplained_time(profile: Profile, bottleneck: Bottleneck) -> str:
    """Describe the time of the step that none of the limits accounts for."""
    explained_s = (
        bottleneck.launch_s + bottleneck.host_s + max(bottleneck.memory_s, bottleneck.compute_s)
    )
    left = max(0.0, profile.step_s - explained_s)
    share = f"{percent(left / profile.step_s)} ({duration(left)})"
    return f"kernels running below peak speed take {share} of the step"
