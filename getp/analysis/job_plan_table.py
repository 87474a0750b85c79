"""The predictions of a job as a table."""

from collections.abc import Sequence

from getp import tables
from getp.analysis.job_plan import ASSUMED, Job, Limits, Prediction
from getp.analysis.lookup import Model
from getp.units import counted, duration, percent


def print_job(
    model: Model,
    job: Job,
    dtype: str,
    limits: Limits,
    predictions: Sequence[Prediction],
    token_source: str,
) -> None:
    """Print the predictions on standard output; token_source: how tokens were counted."""
    console = tables.console()
    console.print(
        f"{model.name}, {dtype}: {counted(len(job.prompts), 'request')}, {job.prompt_tokens:,} "
        f"prompt tokens ({token_source}), at most {job.output_tokens:,} output tokens",
        style="bold",
        soft_wrap=True,
    )
    if job.refused:
        console.print(
            f"not included: {counted(job.refused, 'request')}, refused or without room for output",
            soft_wrap=True,
        )
    priced = any(prediction.price is not None for prediction in predictions)
    several = any(one.tensor_parallel * one.replicas > 1 for one in predictions)
    numbers = ["prefill", "decode", "batch", "time", "tok/s", "efficiency"]
    table = tables.table(
        ["GPU", *(["layout (comm.)"] if several else []), "bound by"],
        [*numbers, *(["price"] if priced else [])],
    )
    for one in predictions:
        table.add_row(one.name, *([_layout(one)] if several else []), *_cells(one, priced))
    tables.show(console, table)
    console.print(_notes(predictions, limits), style="dim", soft_wrap=True)


def _layout(one: Prediction) -> str:
    """Return the layout of the GPUs, with the share of time spent on communication."""
    parts = []
    if one.replicas > 1:
        parts.append(f"{one.replicas} replicas")
    if one.tensor_parallel > 1:
        parts.append(f"TP={one.tensor_parallel} ({percent(one.link_s / (one.seconds or 1))})")
    return " × ".join(parts) or "1 GPU"


def _cells(one: Prediction, priced: bool) -> list[str]:
    if one.seconds is None or one.tok_s is None:
        return ["does not fit"]
    cells = [
        one.decode_bound or "-",
        duration(one.prefill_s),
        duration(one.decode_s),
        f"{one.mean_batch:,.1f}",
        duration(one.seconds),
        f"{one.tok_s:,.0f}",
        f"{one.efficiency.compute:.0%}/{one.efficiency.memory:.0%}",
    ]
    return [*cells, f"{one.price:,.4f}" if one.price is not None else "-"] if priced else cells


def _notes(predictions: Sequence[Prediction], limits: Limits) -> str:
    lines = [
        "Every request is assumed to generate up to its limit, with at most",
        f"{counted(limits.max_batch_size, 'request')} at once and "
        f"{counted(limits.max_batch_tokens, 'token')} per step. Host time (scheduling,",
        "sampling and other work) is not included.",
    ]
    if any(one.tensor_parallel > 1 for one in predictions):
        lines.append("comm.: the share of the time that the GPUs of a model communicate.")
    if any(one.price is not None for one in predictions):
        lines.append("Price: of the whole job, at the given price per GPU-hour.")
    lines.append("Efficiency: the expected shares of peak FLOP/s and of bandwidth.")
    lines += dict.fromkeys(map(_efficiency_source, predictions))
    return "\n" + "\n".join(lines)


def _efficiency_source(one: Prediction) -> str:
    if one.efficiency.source != ASSUMED:
        return f"  {one.name}: {one.efficiency.source}"
    compute, memory = one.efficiency.compute, one.efficiency.memory
    return f"  Assumed: {compute:.0%} of peak FLOP/s, {memory:.0%} of bandwidth"
