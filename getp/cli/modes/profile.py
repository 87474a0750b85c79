"""Mode profile: a measured step, and where its time goes."""

from dataclasses import replace

from getp import tables
from getp.cli import loading
from getp.cli.settings import Settings, StepOptions
from getp.errors import UsageProblem
from getp.files import STDIO, check_writable, write_report

_DEFAULT_CONTEXT = 1024
_DEFAULT_GPUS = ("RTX 3090", "RTX 4090", "A100 SXM 40GB", "H100 SXM")


def run(settings: Settings) -> int:
    """Profile the step; return the exit status. Raises GetpError and errors of the engine."""
    step = settings.step
    if step.phase == "backward":
        raise UsageProblem("--phase backward cannot be profiled: the engine does not train")
    if step.trace is not None:
        check_writable(step.trace, "trace")
    phase, batch = step.phase or "decode", step.batch or 1
    from getp.analysis.lookup import find_gpus
    from getp.analysis.profile import profile
    from getp.analysis.profile_table import as_json, print_profile
    from getp.machine import local_device, peaks_of
    from model.families import load_config

    gpus = find_gpus(step.gpu or _DEFAULT_GPUS)
    limit = load_config(loading.checkpoint_folder(settings)).max_positions
    query, context = _sizes(step, phase, limit)
    if query > context:
        raise UsageProblem(
            f"--query {query} is larger than --context {context}, which includes the new tokens"
        )
    # The engine gets exactly the batch that is measured.
    config = replace(settings.engine, max_batch_size=batch, max_batch_tokens=batch * query)
    with loading.load_engine(replace(settings, engine=config)) as engine:
        if step.measure:
            local_device(engine.device, remeasure=True)
        measured = profile(
            engine,
            peaks_of(engine.device),
            phase=phase,
            batch=batch,
            query=query,
            context=context,
            trace=step.trace,
        )
    name = loading.checkpoint_name(settings)
    if step.format == "json":
        write_report(STDIO, as_json(measured, name))
    else:
        print_profile(measured, name, gpus, settings.details)
        if not settings.details:
            tables.hint("--details: the launches, bytes and FLOPs of every component.")
    return 0


def _sizes(step: StepOptions, phase: str, limit: int) -> tuple[int, int]:
    """Return query and context: as given, or mode plan's defaults within the model's limit."""
    default = min(_DEFAULT_CONTEXT, limit)
    query = step.query or (1 if phase == "decode" else step.context or default)
    return query, step.context or max(query, default if phase == "decode" else query)
