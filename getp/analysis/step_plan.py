"""Mode plan: what a step of a model costs and how fast a GPU can do it. Needs no weights, no GPU.

With `-i` it predicts a whole job instead: see `getp.analysis.job_plan`.
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from getp import tables
from getp.errors import GetpError, UsageProblem
from getp.units import percent, quantity, seconds
from model.config import ModelConfig, read_json
from model.cost.devices import DEVICES, Device, UnknownDeviceError, find_device
from model.cost.interconnect import LINKS, Exchange, exchange
from model.cost.known_models import SHAPES, named_config
from model.cost.operations import (
    activation_accesses,
    check_tensor_parallel,
    operations,
    parameter_bytes,
    total,
)
from model.cost.roofline import Bound, bound, largest_batch
from model.cost.workload import Op, Phase, Workload
from model.families import load_config, parse_config

LOCAL = "local"
DEFAULT_GPUS = ("A100 SXM 80GB", "H100 SXM", "H200", "B200", "MI300X", "MI355X")
_DEFAULT_QUERY = 1024  # of a prefill
_GPU_FIGURES = ("time", "tok/s", "MFU", "MBU", "ridge", "batch that fits")


@dataclass(frozen=True)
class Model:
    """What is planned for: its name for people, and its config."""

    name: str
    config: ModelConfig


@dataclass(frozen=True)
class Plan:
    """One step of a model, what it costs, and its bound on each GPU."""

    model: Model
    work: Workload
    ops: list[Op]
    total: Op
    bounds: list[Bound]

    @property
    def exchanges(self) -> dict[int, Exchange]:
        """What one GPU would send, by how many share the model."""
        config, found = self.model.config, {}
        for ranks in {2, 4, 8, self.work.tensor_parallel} - {1}:
            with contextlib.suppress(ValueError):
                check_tensor_parallel(config, ranks)
                found[ranks] = exchange(config, self.work, ranks)
        return dict(sorted(found.items()))


def find_model(given: Path) -> Model:
    """Return a model by checkpoint directory, config.json or well-known name.

    Raises UsageProblem with the names if it is neither, CheckpointError for a bad config.
    """
    if given.is_dir():
        return Model(given.resolve().name, load_config(given))
    if given.is_file():
        return Model(given.resolve().parent.name, parse_config(read_json(given), given))
    name = str(given).lower()
    if name not in SHAPES:
        raise UsageProblem(
            f"no model {str(given)!r}: give a checkpoint directory, a config.json, or one of "
            f"{', '.join(SHAPES)}"
        )
    return Model(name, named_config(name))


def find_gpus(names: Sequence[str]) -> list[Device]:
    """Return the devices named (`all`, `local`, with commas or one by one), else a selection.

    Raises UsageProblem for one that is not known.
    """
    words = [word.strip() for name in names for word in name.split(",")]
    devices: dict[str, Device] = {}
    for word in words or DEFAULT_GPUS:
        for device in DEVICES if word.lower() == "all" else [_find_gpu(word)]:
            devices[device.name] = device
    return list(devices.values())


def measure_again() -> None:
    """Measure this machine, whatever was measured before."""
    from model.cost.measure import local_device

    print("getp: measuring this machine", file=sys.stderr)
    local_device(again=True)


def _find_gpu(name: str) -> Device:
    if name.lower() == LOCAL:
        from model.cost.measure import cached_device, local_device

        found = cached_device()
        if found is None:
            print("getp: measuring this machine, for the first time", file=sys.stderr)
            found = local_device()
        return found.device
    try:
        return find_device(name)
    except UnknownDeviceError as error:
        raise UsageProblem(f"--gpu: {error}") from None


def make_plan(
    model: Model,
    gpus: list[Device],
    *,
    phase: str,
    batch: int,
    query: int | None,
    context: int | None,
    dtype: str,
    tensor_parallel: int = 1,
    fused: bool = False,
) -> Plan:
    """Work out a step. A query or context of None is the phase's usual one.

    Raises UsageProblem for sizes that do not go together.
    """
    query = query or (1 if phase == "decode" else min(_DEFAULT_QUERY, context or _DEFAULT_QUERY))
    context = context or max(query, 1024 if phase == "decode" else query)
    dtype = model.config.dtype if dtype == "auto" else dtype
    if query > context:
        raise UsageProblem(f"--query {query} is more than --context {context}")
    try:
        check_tensor_parallel(model.config, tensor_parallel)
    except ValueError as error:
        raise UsageProblem(f"--tensor-parallel: {error}") from None
    work = Workload(cast(Phase, phase), batch, query, context, dtype, tensor_parallel, fused=fused)
    ops = operations(model.config, work)
    if context > model.config.max_positions:
        print(
            f"getp: warning: a context of {context} is beyond the {model.config.max_positions} "
            f"positions of {model.name}",
            file=sys.stderr,
        )
    step = total(ops)
    sent = exchange(model.config, work)
    bounds = [bound(step, device, dtype, work.tokens, sent) for device in gpus]
    return Plan(model, work, ops, step, bounds)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return what `--format json` prints: integers exact, an op's figures for all its layers."""
    work = plan.work
    return {
        "model": plan.model.name,
        "phase": work.phase,
        "batch": work.batch,
        "query": work.query,
        "context": work.context,
        "dtype": work.dtype,
        "ops": [
            {"name": op.name, "layer_count": op.layer_count, **_figures(op)} for op in plan.ops
        ],
        "total": _figures(plan.total),
        "tensor_parallel": work.tensor_parallel,
        "exchange": {
            str(ranks): {
                **asdict(sent),
                "seconds": {link.name: sent.seconds(link) for link in LINKS.values()},
            }
            for ranks, sent in plan.exchanges.items()
        },
        "gpus": [
            {
                "name": found.device.name,
                "bound": found.limit,
                "seconds": found.seconds,
                "link": found.device.link.name,
                "link_s": found.link_s,
                "tok_s": found.tok_s,
                "mfu": found.mfu,
                "mbu": found.mbu,
                "ridge": found.device.ridge(work.dtype),
                "intensity": plan.total.intensity,
            }
            for found in plan.bounds
        ],
    }


def _figures(op: Op) -> dict[str, Any]:
    return {"flops": asdict(op.flops), "bytes": asdict(op.bytes), "launches": op.launches}


def print_plan(plan: Plan) -> None:
    """Print the operations, their total and the GPUs as tables on standard output."""
    console = tables.console()
    console.print(_title(plan), style="bold", soft_wrap=True)
    tables.show(console, _operations_table(plan))
    console.print(_summary(plan), soft_wrap=True)
    tables.show(console, _gpu_table(plan))
    if plan.exchanges and not plan.work.backward:
        tables.show(console, _exchange_table(plan))
    console.print(_notes(plan), style="dim", soft_wrap=True)


def write_plot(plan: Plan, path: str) -> None:
    """Draw the roofline into a file, or on the terminal for `-`. Raises GetpError."""
    devices, dtype = [found.device for found in plan.bounds], plan.work.dtype
    title = _title(plan)
    if plan.work.backward:
        raise GetpError("the backward pass has no roofline: only its FLOPs are counted")
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
        work.dtype + (", experts in mxfp4" if plan.model.config.mxfp4_experts else ""),
    ]
    if work.tensor_parallel > 1:
        words.append(f"one of {work.tensor_parallel} GPUs")
    return ", ".join([*words, *(["fused"] if work.fused else [])])


def _operations_table(plan: Plan) -> Table:
    figures = ("matrix", "vector", "special", "weights", "activ.", "KV", "FLOP/B", "launches")
    table = tables.table(["operation"], ["layers", *figures])
    for op in plan.ops:
        table.add_row(op.name, str(op.layer_count), *_cells(op))
    table.add_row("total", "", *_cells(plan.total), style="bold")
    return table


def _cells(op: Op) -> list[str]:
    parts = (op.flops.matrix, op.flops.vector, op.flops.special)
    moved = (op.bytes.weights, op.bytes.activations, op.bytes.kv)
    intensity = f"{op.intensity:,.1f}" if op.intensity else "-"
    return [*map(quantity, parts), *map(quantity, moved), intensity, f"{op.launches:,}"]


def _summary(plan: Plan) -> str:
    work, config = plan.work, plan.model.config
    weights = parameter_bytes(config, work.dtype, work.tensor_parallel)
    line = f"weights stored: {quantity(weights)}B"
    if work.backward:
        return line + "; a forward pass of its own comes before this backward pass\n"
    other = Workload(
        work.phase, work.batch, work.query, work.context, work.dtype, work.tensor_parallel,
        fused=not work.fused,
    )  # fmt: skip
    totals = {work.fused: plan.total, other.fused: total(operations(config, other))}
    sparse = any(layer.sparse for layer in config.layers)
    forms = (
        f"{name} {quantity(totals[fused].bytes.activations)}B of activations "
        f"({activation_accesses(fused, sparse)} round trips a layer), "
        f"{totals[fused].launches:,} launches"
        for name, fused in (("unfused", False), ("fused", True))
    )
    return f"{line}\n" + "\n".join(forms) + "\n"


def _gpu_table(plan: Plan) -> Table:
    shared = plan.work.tensor_parallel > 1
    table = tables.table(
        ["GPU", "bound by", *(["link"] if shared else [])],
        [*(["sending"] if shared else []), *_GPU_FIGURES],
    )
    work = plan.work
    for found in plan.bounds:
        device = found.device
        fits = largest_batch(plan.model.config, work, device)
        table.add_row(
            device.name + ("*" if device.computes_in(work.dtype) != work.dtype else ""),
            found.limit,
            *([device.link.name, seconds(found.link_s)] if shared else []),
            seconds(found.seconds),
            f"{found.tok_s:,.0f}" if found.tok_s >= 100 else f"{found.tok_s:.2f}",
            percent(found.mfu),
            percent(found.mbu),
            f"{device.ridge(work.dtype):,.0f}",
            "-" if work.backward else f"{fits:,}" if fits else "none",
        )
    return table


def _notes(plan: Plan) -> str:
    work = plan.work
    lines = [
        "Time is the longest of computing, moving bytes and launching kernels one by one, at the",
        "datasheet's peaks; MFU and MBU are what is then in use. Fusion and graph capture lift a",
        "launch bound, nothing lifts the others.",
    ]
    lines += [
        f"{found.device.name}: {found.device.source}"
        + (
            f", a launch {seconds(found.device.launch_s)}; --measure measures it again"
            if found.device.name == LOCAL
            else ""
        )
        for found in plan.bounds
    ]
    lines += [
        f"* {found.device.name} computes {work.dtype} as {found.device.computes_in(work.dtype)}."
        for found in plan.bounds
        if found.device.computes_in(work.dtype) != work.dtype
    ]
    lines += [
        "Sending adds to a step's time: bytes over what a GPU can send, and an assumed latency",
        "of each collective.",
    ]
    if work.tensor_parallel > 1:
        links = dict.fromkeys(found.device.link for found in plan.bounds)
        lines += [f"{link.name}: {link.source}" for link in links]
    return "\n" + "\n".join(lines)


def _exchange_table(plan: Plan) -> Table:
    """What a step's collectives take on every link, by how many GPUs share the model."""
    table = tables.table(["sending, a step"], [f"{ranks} GPUs" for ranks in plan.exchanges])
    sent = plan.exchanges.values()
    table.add_row("collectives", *(f"{each.collectives}" for each in sent))
    table.add_row("bytes from each GPU", *(f"{quantity(each.bytes)}B" for each in sent))
    for link in LINKS.values():
        table.add_row(link.name, *(seconds(each.seconds(link)) for each in sent))
    return table
