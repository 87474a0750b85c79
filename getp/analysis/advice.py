"""The limit of a measured step, and the changes that would help with their predicted gains.

A change saves launches, bytes or host time, or it scales the time of each part without its launches
in proportion to the roofline limit of the part.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from getp.analysis.profile import HOST_PARTS, Component, Profile, gather
from getp.units import duration, percent, quantity
from model.cost.operations import operations, total
from model.cost.roofline import largest_batch
from model.cost.workload import Op, Workload

_MIN_GAIN = 0.01  # smaller gains are not listed
_MIN_DOUBLING_GAIN = 1.1  # the batch is doubled while throughput grows by this factor
# float8 is a prediction only: the engine does not compute in it.
_SMALLER = {"float32": "bfloat16", "bfloat16": "float8", "float16": "float8"}
# Parts that become one kernel per layer (qwen2-layer-data-flow). Then the activations of one
# operation are no longer moved: its name, and how often they were.
_FUSIONS = (
    ("norm and QKV", ("input_norm", "qkv_proj"), ("input_norm", 1)),
    ("norm and gate/up", ("post_norm", "gate_up_proj"), ("post_norm", 1)),
    ("gate/up, activation and down", ("gate_up_proj", "activation", "down_proj"),
     ("activation", 2)),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Seconds that each limit requires of the step, the largest of them, and the evidence."""

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


def judge(found: Profile) -> Verdict:
    """Return the limit that bounds the step.

    Launch overhead is the idle time of the GPU within the model. A CPU does not overlap operations,
    so there it is the number of operations times the cost of starting one.
    """
    step, device = total(found.ops), found.device
    compute = max(
        step.flops.matrix / device.peak(found.work.dtype),
        step.flops.vector / device.vector,
        step.flops.special / device.special,
    )
    required = {
        "launch": launch_seconds(found),
        "memory": step.bytes.total / device.bandwidth,
        "compute": compute,
        "host": found.seconds_of(*HOST_PARTS),
    }
    bound = max(required, key=lambda kind: required[kind])
    shares = {kind: percent(required[kind] / found.step_s) for kind in required}
    kind = "kernels" if found.on_gpu else "operations"
    how = "is GPU idle time between" if found.on_gpu else "is spent on starting"
    sentences = {
        "launch": f"{shares['launch']} of the step {how} {found.launches:,} {kind}",
        "memory": f"moving {quantity(step.bytes.total, 'B')} at peak bandwidth takes "
        f"{shares['memory']} of the step",
        "compute": f"computing its FLOPs at peak speed takes {shares['compute']} of the step",
        "host": f"scheduling and batch preparation take {shares['host']} of the step",
    }
    evidence = "; ".join(sorted(sentences.values(), key=lambda text: text != sentences[bound]))
    return Verdict(bound, evidence, *required.values())


def launch_seconds(found: Profile) -> float:
    """Return the seconds of the step that launches take, see `judge`."""
    if found.busy_s is not None:
        return max(0.0, found.step_s - found.busy_s - found.seconds_of(*HOST_PARTS))
    return min(found.launches * found.device.launch_s, found.step_s)


def advise(found: Profile) -> list[Advice]:
    """Return the changes that would help, largest gain first."""
    changes = [*_fusions(found), *_host(found), *_kernels(found)]
    changes += [*_larger_batch(found), *_smaller_dtype(found)]
    return sorted((a for a in changes if a.gain >= _MIN_GAIN), key=lambda a: -a.gain)


def as_json(verdict: Verdict, advice: list[Advice]) -> dict[str, Any]:
    """Return both for `--format json`."""
    return {"verdict": asdict(verdict), "advice": [asdict(one) for one in advice]}


def _saving(found: Profile, change: str, saved_s: float) -> Advice:
    step = max(found.step_s - saved_s, found.step_s * 1e-3)
    tok_s = found.work.tokens / step
    return Advice(change, step, tok_s, tok_s / found.tok_s - 1)


def _fusions(found: Profile) -> list[Advice]:
    if not found.launches:
        return []
    each = launch_seconds(found) / found.launches
    parts = {part.name: part for part in found.components}
    advice = []
    for title, names, (moved, times) in _FUSIONS:
        before = sum(parts[name].launches for name in names)
        after = max(parts[name].op.layer_count for name in names)
        if before <= after:
            continue  # already fused
        saved = parts[moved].op.bytes.activations * times / found.device.bandwidth
        text = f"fuse {title}: {after:,} launches instead of {before:,}"
        advice.append(_saving(found, text, (before - after) * each + saved))
    unfused, fused = total(found.ops), total(_operations(found, replace(found.work, fused=True)))
    if found.launches <= fused.launches:
        return advice
    saved = (unfused.bytes.activations - fused.bytes.activations) / found.device.bandwidth
    fewer = found.launches - fused.launches
    text = f"fuse whole layers: {fused.launches:,} launches instead of {found.launches:,}"
    return [*advice, _saving(found, text, fewer * each + saved)]


def _host(found: Profile) -> list[Advice]:
    """Return the changes that apply only where the model runs on a GPU, beside the host."""
    if not found.on_gpu:
        return []
    host = found.seconds_of(*HOST_PARTS)
    return [
        _saving(found, "capture the step as a graph", launch_seconds(found)),
        _saving(found, "schedule the next step while this one runs", host),
    ]


def _kernels(found: Profile) -> list[Advice]:
    """Return the gain of the operation that takes longest beyond its limit on this device."""
    known = [part for part in found.components if part.op.layer_count]
    limits = {part.name: _limit(found, [part.op], found.work.dtype) for part in known}
    worst = max(known, key=lambda part: _own_seconds(found, part) - limits[part.name])
    own, limit = _own_seconds(found, worst), limits[worst.name]
    if own <= limit:
        return []
    return [_saving(found, f"a faster {worst.name}: now at {percent(limit / own)} of its limit",
                    own - limit)]  # fmt: skip


def _own_seconds(found: Profile, part: Component) -> float:
    """Return the seconds of a part without its launches; for parts of the host, all of them."""
    taken = found.seconds_of(part.name)
    if part.name in HOST_PARTS:
        return taken
    if part.busy_s is not None:
        return part.busy_s
    return max(0.0, taken - launch_seconds(found) * part.launches / max(1, found.launches))


def _larger_batch(found: Profile) -> list[Advice]:
    """Return the gain of the largest batch up to which doubling pays and fits."""
    work, most = found.work, largest_batch(found.config, found.work, found.device)
    best, tok_s = work.batch, found.tok_s
    while 2 * best <= most:
        larger = replace(work, batch=2 * best)
        reached = larger.tokens / _predicted(found, larger)
        if reached < tok_s * _MIN_DOUBLING_GAIN:
            break
        best, tok_s = larger.batch, reached
    if best == work.batch:
        return []
    step = best * work.query / tok_s
    return [Advice(f"a batch of {best:,} instead of {work.batch:,}", step, tok_s,
                   tok_s / found.tok_s - 1)]  # fmt: skip


def _smaller_dtype(found: Profile) -> list[Advice]:
    smaller = _SMALLER[found.work.dtype]
    if smaller not in found.device.peaks:
        return []  # it would be widened on its way to the units, which costs time on a CPU
    step = _predicted(found, replace(found.work, dtype=smaller))
    return [_saving(found, f"weights, activations and KV cache in {smaller}", found.step_s - step)]


def _predicted(found: Profile, work: Workload) -> float:
    """Return the seconds of another step with the same number of launches.

    The time of a part grows with its roofline limit, or with the number of tokens if the cost model
    does not know the part.
    """
    ops = {op.name: op for op in _operations(found, work)}
    step = launch_seconds(found)
    for part in found.components:
        growth = work.tokens / found.work.tokens
        if part.op.layer_count:
            now = _limit(found, [part.op], found.work.dtype)
            growth = _limit(found, [ops[part.name]], work.dtype) / now
        step += _own_seconds(found, part) * growth
    return step


def _operations(found: Profile, work: Workload) -> list[Op]:
    return gather(operations(found.config, work), found.within)


def _limit(found: Profile, ops: list[Op], dtype: str) -> float:
    """Return the seconds of the operations in sequence, each at its roofline limit."""
    device = found.device
    return sum(
        max(
            op.flops.matrix / device.peak(dtype),
            op.flops.vector / device.vector,
            op.flops.special / device.special,
            op.bytes.total / device.bandwidth,
        )
        for op in ops
    )


def rest(found: Profile, verdict: Verdict) -> str:
    """Describe the time of the step that the limits of the verdict do not explain."""
    known = verdict.launch_s + verdict.host_s + max(verdict.memory_s, verdict.compute_s)
    left = max(0.0, found.step_s - known)
    share = f"{percent(left / found.step_s)} ({duration(left)})"
    return f"kernels running below peak speed take {share} of the step"
