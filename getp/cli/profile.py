"""The options of mode profile → a measured step, and how it is shown."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from getp.errors import UsageProblem
from getp.files import check_writable
from getp.units import print_json

if TYPE_CHECKING:
    from engine import Engine

_DEFAULT_CONTEXT = 1024
_DEFAULT_GPUS = ("RTX 3090", "RTX 4090", "A100 SXM 40GB", "H100 SXM")  # as bottleneck-analysis


def run(
    options: SimpleNamespace,
    checkpoint: Path,
    name: str,
    load_engine: Callable[[SimpleNamespace], "Engine"],
) -> int:
    """Profile the step that the options ask for; return the exit status. Raises GetpError."""
    if options.phase == "backward":
        raise UsageProblem("--phase backward cannot be profiled: the engine does not train")
    if options.trace is not None:
        check_writable(options.trace)
    phase, batch = options.phase or "decode", options.batch or 1
    from getp.analysis.profile import profile
    from getp.analysis.profile_table import as_json, print_profile
    from getp.analysis.step_plan import find_gpus
    from getp.report.efficiency import peaks_of
    from model.cost.measure import local_device
    from model.families import load_config

    gpus = find_gpus(options.gpu or _DEFAULT_GPUS)
    # The sizes first, for they are the engine's too.
    query, context = _sizes(options, phase, load_config(checkpoint).max_positions)
    if query > context:
        raise UsageProblem(f"--query {query} is more than --context {context}")
    sizes = {"max_batch_size": batch, "max_batch_tokens": batch * query}
    engine = load_engine(SimpleNamespace(**{**vars(options), **sizes}))
    with engine:
        if options.measure:
            local_device(engine.device, again=True)
        found = profile(
            engine,
            peaks_of(engine.device),
            phase=phase,
            batch=batch,
            query=query,
            context=context,
            trace=options.trace,
        )
    if options.format == "json":
        print_json(as_json(found, name))
    else:
        print_profile(found, name, gpus)
    return 0


def _sizes(options: SimpleNamespace, phase: str, most: int) -> tuple[int, int]:
    """Query and context: those given, else mode plan's usual ones as far as the model goes."""
    usual = min(_DEFAULT_CONTEXT, most)
    query = options.query or (1 if phase == "decode" else options.context or usual)
    return query, options.context or max(query, usual if phase == "decode" else query)
