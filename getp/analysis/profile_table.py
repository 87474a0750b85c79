"""A measured step as a bottleneck analysis for users, and as JSON for programs."""

from dataclasses import asdict
from typing import Any

from rich.table import Table

from getp import tables
from getp.analysis.advice import Advice, Bottleneck, advise, find_bottleneck, unexplained_time
from getp.analysis.advice import as_json as advice_json
from getp.analysis.lookup import LOCAL
from getp.analysis.profile import Component, Profile
from getp.analysis.step_plan import time_name
from getp.units import duration, percent, quantity
from model.cost.devices import Device
from model.cost.operations import total

_LARGEST_PARTS = 5  # listed without details
_WIDE = 80  # columns; a narrower terminal does not show the share of all bytes


def print_profile(
    profile: Profile, model: str, others: list[Device], details: bool = False
) -> None:
    """Print the analysis on standard output.

    details: also the launches, bytes and FLOPs of all components, and the share of their bandwidth
    that `others` would need.
    """
    bottleneck, advice = find_bottleneck(profile), advise(profile)
    console = tables.console()
    work, name = profile.work, profile.device.name
    slowdown = round(profile.times.slowdown, 3) + 0.0  # not -0.0
    console.print(
        f"{model}: {work.phase}, batch {work.batch:,}, query {work.query:,}, context "
        f"{work.context:,}, {work.dtype} on {'this machine' if name == LOCAL else name} "
        f"({profile.device.source})",
        style="bold",
        soft_wrap=True,
    )
    console.print(_step(profile), soft_wrap=True)
    console.print(f"{bottleneck.bound}-bound: {bottleneck.evidence}.", style="bold", soft_wrap=True)
    console.print(
        f"Beyond these limits, {unexplained_time(profile, bottleneck)}.\n", soft_wrap=True
    )
    if details:
        console.print(_limits(profile, bottleneck), soft_wrap=True)
        tables.show(console, _parts_table(profile, console.width >= _WIDE))
        console.print(_bandwidths(profile, others), soft_wrap=True)
    else:
        tables.show(console, _largest_parts_table(profile))
        console.print()
    tables.show(console, _advice_table(advice))
    console.print(
        "\nGains are upper limits that the cost model predicts for each change alone. Timing the "
        f"parts changes the time of the step by {slowdown:+.1%}; shares refer to the timed step.",
        style="dim",
        soft_wrap=True,
    )


def as_json(profile: Profile, model: str) -> dict[str, Any]:
    """Return the profile for `--format json`: seconds, each operation over all its layers."""
    work, step = profile.work, total(profile.ops)
    return {
        "model": model,
        "phase": work.phase,
        "batch": work.batch,
        "query": work.query,
        "context": work.context,
        "dtype": work.dtype,
        "device": {"name": profile.device.name, "source": profile.device.source},
        "step_s": profile.step_s,
        "timed_step_s": profile.times.timed_s,
        "slowdown": profile.times.slowdown,
        "steps_measured": profile.times.steps,
        "tok_s": profile.tok_s,
        "launches": profile.launches,
        "launches_per_token": profile.launches / work.tokens,
        "bytes": asdict(step.bytes),
        "flops": asdict(step.flops),
        "bytes_per_s": step.bytes.total / profile.step_s,
        "flops_per_s": step.flops.matrix / profile.step_s,
        "mbu": step.bytes.total / profile.step_s / profile.device.bandwidth,
        "mfu": step.flops.matrix / profile.step_s / profile.device.peak(work.dtype),
        "parts": [_part_json(part, profile) for part in profile.components],
        **advice_json(find_bottleneck(profile), advise(profile)),
    }


def _part_json(part: Component, profile: Profile) -> dict[str, Any]:
    return {
        "name": part.name,
        "seconds": part.seconds,
        "share": part.seconds / profile.times.timed_s,
        "launches": part.launches,
        "busy_s": part.busy_s,
        "within": part.within,
        "flops": asdict(part.op.flops),
        "bytes": asdict(part.op.bytes),
    }


def _step(profile: Profile) -> str:
    per_layer_s = profile.step_s / len(profile.config.layers)
    return (
        f"{time_name(profile.work)}: {duration(profile.step_s)}, {duration(per_layer_s)} per "
        f"layer; {profile.tok_s:,.1f} tok/s"
    )


def _limits(profile: Profile, bottleneck: Bottleneck) -> str:
    """Describe the launches, bytes and FLOPs of the step, and the rates that it reaches."""
    work, step, device = profile.work, total(profile.ops), profile.device
    layers = len(profile.config.layers)
    moved, computed = step.bytes.total / profile.step_s, step.flops.matrix / profile.step_s
    kind = "kernels" if profile.on_gpu else "operations"
    lines = [
        f"launches  {profile.launches:,} {kind} per step, "
        f"{profile.launches / layers:.1f} per layer, "
        f"{profile.launches / work.tokens:,.1f} per token; "
        f"{duration(bottleneck.launch_s)} of overhead",
        f"memory    {quantity(step.bytes.total, 'B')} per step: {quantity(moved, 'B/s')} of "
        f"{quantity(device.bandwidth, 'B/s')}",
        f"compute   {quantity(step.flops.matrix, 'FLOP')} per step: "
        f"{quantity(computed, 'FLOP/s')} of {quantity(device.peak(work.dtype), 'FLOP/s')}",
    ]
    if profile.busy_s is not None:
        lines.append(f"GPU       busy for {percent(profile.busy_s / profile.step_s)} of the step")
    return "\n".join([*lines, ""])


def _largest_parts_table(profile: Profile) -> Table:
    """Return the components that take most of the time, and the sum of the others."""
    table = tables.table(["component"], ["time", "% time"])
    timed = (part for part in profile.components if not part.within)
    ranked = sorted(timed, key=lambda part: -part.seconds)
    others = ranked[_LARGEST_PARTS:]
    rows = [(_label(part), part.seconds) for part in ranked[:_LARGEST_PARTS]]
    rows.append((f"{len(others)} more components", sum(part.seconds for part in others)))
    for name, seconds in rows:
        table.add_row(name, duration(seconds), percent(seconds / profile.times.timed_s))
    return table


def _parts_table(profile: Profile, wide: bool) -> Table:
    of_bytes = ["% bytes"] if wide else []
    figures = ["time", "% time", "launches", "bytes", *of_bytes, "B/s", "FLOP/s"]
    table = tables.table(["component"], figures)
    bytes_of_all = total(profile.ops).bytes.total
    for part in profile.components:
        if part.within:
            table.add_row(_label(part), *["-"] * len(figures))
            continue
        moved, share = part.op.bytes.total, part.seconds / profile.times.timed_s
        table.add_row(
            _label(part),
            duration(part.seconds),
            percent(share),
            f"{part.launches:,}",
            quantity(moved),
            *([percent(moved / bytes_of_all) if moved else "-"] if wide else []),
            quantity(moved / part.seconds) if part.seconds else "-",
            quantity(part.op.flops.matrix / part.seconds) if part.seconds else "-",
        )
    table.add_row(
        "total",
        duration(profile.times.timed_s),
        percent(1.0),
        f"{profile.launches:,}",
        quantity(bytes_of_all),
        *([percent(1.0)] if wide else []),
        style="bold",
    )
    return table


def _label(part: Component) -> str:
    if part.within:
        return f"{part.name} in {part.within}"
    return part.name if part.op.layer_count else part.name.replace("_", " ")


def _bandwidths(profile: Profile, others: list[Device]) -> str:
    """Describe the share of the bandwidth of other devices that the same speed would use."""
    if not others:
        return ""
    moved = total(profile.ops).bytes.total / profile.step_s
    uses = (f"{device.name} {percent(moved / device.bandwidth)}" for device in others)
    return (
        f"\nShare of their bandwidth that other devices need for this speed: {', '.join(uses)}.\n"
    )


def _advice_table(advice: list[Advice]) -> Table:
    table = tables.table(["possible change"], ["step", "tok/s", "gain"])
    for one in advice:
        table.add_row(one.change, duration(one.step_s), f"{one.tok_s:,.1f}", _gain(one.gain))
    return table


def _gain(gain: float) -> str:
    return f"{gain:+.0%}" if gain < 1 else f"{1 + gain:.1f}×"
