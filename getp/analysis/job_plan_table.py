"""The predictions of a job as a table."""

from collections.abc import Sequence

from getp import tables
from getp.analysis.job_plan import ASSUMED, Job, Prediction
from getp.analysis.lookup import Model
from getp.units import counted, duration, percent


def print_job(
    model: Model,
    job: Job,
    dtype: str,
    predictions: Sequence[Prediction],
    token_source: str,
    details: bool = False,
) -> None:
    """Print the predictions on standard output.

    token_source: how tokens were counted. details: also the time and the batch of each phase.
    """
    console = tables.console()
    planned = ", ".join([model.name, dtype, *model.changes])
    console.print(
        f"{planned}: {counted(len(job.prompts), 'request')}, "
        f"{job.prompt_tokens:,} prompt tokens ({token_source}), "
        f"at most {job.output_tokens:,} output tokens",
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
    numbers = ["time", "tok/s", "time to first token", "time per output token"]
    numbers += ["prefill", "decode", "batch"] if details else []
    table = tables.table(
        ["GPU", *(["layout (comm.)"] if several else []), "bound by"],
        [*numbers, *(["price"] if priced else [])],
    )
    for one in predictions:
        layout = [_layout(one)] if several else []
        table.add_row(one.name, *layout, *_cells(one, details, priced))
    tables.show(console, table)
    console.print(_notes(predictions), style="dim", soft_wrap=True)


def _layout(one: Prediction) -> str:
    """Return the layout of the GPUs, with the share of time spent on communication."""
    parts = []
    if one.replicas > 1:
        parts.append(f"{one.replicas} replicas")
    if one.tensor_parallel > 1:
        share = f" ({percent(one.link_s / one.seconds)})" if one.seconds else ""
        parts.append(f"TP={one.tensor_parallel}{share}")
    return " × ".join(parts) or "1 GPU"


def _cells(one: Prediction, details: bool, priced: bool) -> list[str]:
    if one.seconds is None or one.tok_s is None:
        return ["does not fit"]
    cells = [
        one.decode_bound or "-",
        duration(one.seconds),
        f"{one.tok_s:,.0f}",
        duration(one.ttft_s),
        duration(one.per_token_s) if one.decode_steps else "-",
    ]
    if details:
        cells += [duration(one.prefill_s), duration(one.decode_s), f"{one.mean_batch:,.1f}"]
    return [*cells, f"{one.price:,.4f}" if one.price is not None else "-"] if priced else cells


def _notes(predictions: Sequence[Prediction]) -> str:
    lines = [
        "Every request is assumed to generate up to its limit. The time to the first token",
        "does not include the time that a request waits before its first step.",
    ]
    if not all(one.efficiency.at_rates for one in predictions):
        lines.append("Host time (scheduling, sampling and other work) is not included.")
    of_limits: dict[str, list[str]] = {}
    for one in predictions:
        size, tokens = (
            counted(one.max_batch_size, "request"),
            counted(one.max_batch_tokens, "token"),
        )
        of_limits.setdefault(f"At most {size} at once and {tokens} per step", []).append(one.name)
    for text, names in of_limits.items():
        where = f" on {', '.join(dict.fromkeys(names))}" if len(of_limits) > 1 else ""
        lines.append(f"{text}{where}.")
    if any(one.tensor_parallel > 1 for one in predictions):
        lines.append("comm.: the share of the time that the GPUs of a model communicate.")
    if any(one.price is not None for one in predictions):
        lines.append("Price: of the whole job, at the given price per GPU-hour.")
    lines += dict.fromkeys(map(_efficiency, predictions))
    return "\n" + "\n".join(lines)


def _efficiency(one: Prediction) -> str:
    """Return the expected shares of a device's peaks, and where they come from."""
    found = one.efficiency
    if found.at_rates:
        return f"{one.name}: at the measured rates of its kernels ({found.source})"
    shares = f"{found.compute:.0%} of peak FLOP/s, {found.memory:.0%} of bandwidth"
    if found.source == ASSUMED:
        return f"Assumed: {shares}"
    return f"{one.name}: {shares} ({found.source})"
