"""The plan of one step as tables, or as a roofline plot."""

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from getp import tables
from getp.analysis.lookup import LOCAL
from getp.analysis.step_plan import Plan, time_name
from getp.errors import GetpError
from getp.units import duration, percent, quantity
from model.config import ModelConfig
from model.cost.interconnect import LINKS
from model.cost.operations import activation_accesses, operations, parameter_bytes, total
from model.cost.roofline import Bound, largest_batch
from model.cost.workload import Op
from model.formats import DENSE, MXFP4
from model.formats.dense import Dequantized

_OPERATION_COLUMNS = (
    *("layers", "matrix", "vector", "special"),
    *("weights", "activ.", "KV", "FLOP/B", "launches"),
)


def print_plan(plan: Plan, details: bool = False) -> None:
    """Print the time on each GPU on standard output.

    details: also the utilization, the operations with their total, and the communication.
    """
    console = tables.console()
    console.print(_title(plan), style="bold", soft_wrap=True)
    tables.show(console, _gpu_table(plan, details))
    console.print(_summary(plan, details), soft_wrap=True)
    if details:
        tables.show(console, _operations_table(plan))
        if plan.exchanges and not plan.work.backward:
            console.print()
            tables.show(console, _exchange_table(plan))
    console.print("\n".join(["", *_notes(plan, details)]), style="dim", soft_wrap=True)


def write_plot(plan: Plan, path: str) -> None:
    """Draw the roofline into a file, or on the terminal for `-`. Raises GetpError."""
    devices, dtype = [gpu_bound.device for gpu_bound in plan.bounds], plan.work.dtype
    title = _title(plan)
    if plan.work.backward:
        raise GetpError(
            "the backward pass has no roofline: only its FLOPs are counted; use prefill or decode"
        )
    if path == "-":
        from getp.analysis.roofline_text import roofline_text

        console = Console(highlight=False)
        text = roofline_text(plan.ops, devices, dtype, console.width)
        return console.print(title + "\n" + text, soft_wrap=True, markup=False)
    from getp.analysis.roofline_plot import draw_roofline

    draw_roofline(plan.ops, devices, dtype, title, path)


def _title(plan: Plan) -> str:
    work = plan.work
    words = [
        f"{plan.model.name}: {work.phase}",
        f"batch {work.batch:,}",
        f"query {work.query:,}",
        f"context {work.context:,}",
        work.dtype + _formats(plan.model.config),
        *plan.model.changes,
    ]
    if work.tensor_parallel > 1:
        words.append(f"split over {work.tensor_parallel} GPUs (figures per GPU)")
    return ", ".join([*words, *(["fused"] if work.fused else [])])


def _formats(config: ModelConfig) -> str:
    """The formats of the weights, as an addition to the dtype; empty if all are dense."""
    kept = dict.fromkeys(layer.formats.experts.name for layer in config.layers if layer.sparse)
    stored = [form for form in config.stored_formats.formats if isinstance(form, Dequantized)]
    dequantized = dict.fromkeys(form.name for form in stored if form.kept == DENSE)
    packed = dict.fromkeys(form.name for form in stored if form.kept != DENSE)
    found = f" (dequantized from {', '.join(dequantized)})" if dequantized else ""
    found += f", weights in {' and '.join(packed)}" if packed else ""
    return found + "".join(f", experts in {name}" for name in kept if name == MXFP4.name)


def _operations_table(plan: Plan) -> Table:
    table = tables.table(["operation"], _OPERATION_COLUMNS)
    for op in plan.ops:
        table.add_row(op.name, str(op.layer_count), *_cells(op))
    table.add_row("total", "", *_cells(plan.total), style="bold")
    return table


def _cells(op: Op) -> list[str]:
    flops = (op.flops.matrix, op.flops.vector, op.flops.special)
    moved = (op.bytes.weights, op.bytes.activations, op.bytes.kv)
    intensity = f"{op.intensity:,.1f}" if op.intensity else "-"
    return [*map(quantity, flops), *map(quantity, moved), intensity, f"{op.launches:,}"]


def _summary(plan: Plan, details: bool) -> str:
    work, config = plan.work, plan.model.config
    weights = parameter_bytes(config, work.dtype, work.tensor_parallel)
    line = f"stored weights: {quantity(weights, 'B')}"
    if work.backward:
        line += "; the forward pass before this backward pass is not included"
    if work.backward or not details:
        return line
    other = replace(work, fused=not work.fused)
    totals = {work.fused: plan.total, other.fused: total(operations(config, other))}
    sparse = any(layer.sparse for layer in config.layers)
    forms = (
        f"{name + ':':<9}{quantity(totals[fused].bytes.activations, 'B')} of activations "
        f"({activation_accesses(fused, sparse)} round trips per layer), "
        f"{totals[fused].launches:,} launches"
        for name, fused in (("unfused", False), ("fused", True))
    )
    return f"{line}\n" + "\n".join(forms) + "\n"


def _gpu_table(plan: Plan, details: bool) -> Table:
    shared = plan.work.tensor_parallel > 1
    figures = [*(["comm."] if shared else []), time_name(plan.work), "tok/s"]
    figures += ["MFU", "MBU", "ridge"] if details else []
    table = tables.table(
        ["GPU", "bound by", *(["link"] if shared else [])], [*figures, "largest batch"]
    )
    work = plan.work
    for gpu_bound in plan.bounds:
        device = gpu_bound.device
        fits = largest_batch(plan.model.config, work, device)
        table.add_row(
            device.name + ("*" if device.computes_in(work.dtype) != work.dtype else ""),
            gpu_bound.limit,
            *([device.link.name, duration(gpu_bound.link_s)] if shared else []),
            duration(gpu_bound.seconds),
            f"{gpu_bound.tok_s:,.0f}" if gpu_bound.tok_s >= 100 else f"{gpu_bound.tok_s:.2f}",
            *(_utilization(gpu_bound, work.dtype) if details else []),
            "-" if work.backward else f"{fits:,}" if fits else "none",
        )
    return table


def _utilization(gpu_bound: Bound, dtype: str) -> list[str]:
    ridge = f"{gpu_bound.device.ridge(dtype):,.0f}"
    return [percent(gpu_bound.mfu), percent(gpu_bound.mbu), ridge]


def _exchange_table(plan: Plan) -> Table:
    """Return the time of a step's collectives on every link, by the number of GPUs."""
    headings = [f"{ranks} GPUs" for ranks in plan.exchanges]
    table = tables.table(["communication per step"], headings)
    sent = plan.exchanges.values()
    table.add_row("collectives", *(f"{each.collectives}" for each in sent))
    table.add_row("bytes sent per GPU", *(quantity(each.bytes, "B") for each in sent))
    for link in LINKS.values():
        table.add_row(link.name, *(duration(each.seconds(link)) for each in sent))
    return table


def _notes(plan: Plan, details: bool) -> list[str]:
    work, devices = plan.work, [gpu_bound.device for gpu_bound in plan.bounds]
    communication = ", plus communication" if details or work.tensor_parallel > 1 else ""
    kind = "measured" if all(device.name == LOCAL for device in devices) else "datasheet"
    lines = []
    if any(device.rates is None for device in devices):
        lines = [f"Time = max(compute, memory, launch overhead) at {kind} peaks{communication}."]
    if any(device.rates is not None for device in devices):
        lines += ["local: the sum of its operations at the measured rates of its kernels."]
    if details:
        lines += [
            "MFU and MBU are the shares of peak FLOP/s and bandwidth used in that time.",
            "matrix, vector, special: FLOPs by execution unit. weights, activ., KV: bytes moved.",
            "Fusion reduces activation traffic and launches; graph capture only launch overhead.",
        ]
    lines += [
        f"{device.name}: {device.source}"
        + (f"; {duration(device.launch_s)} per launch" if device.name == LOCAL else "")
        for device in devices
        if details or device.name == LOCAL
    ]
    lines += [
        f"* {device.name} computes {work.dtype} as {device.computes_in(work.dtype)}."
        for device in devices
        if device.computes_in(work.dtype) != work.dtype
    ]
    if details:
        lines.append(
            "Communication = bytes sent / link bandwidth + assumed latency per collective."
        )
        if work.tensor_parallel > 1:
            links = dict.fromkeys(device.link for device in devices)
            lines += [f"{link.name}: {link.source}" for link in links]
    return lines
