"""Mode doctor: check that this machine works, and say what to do about each problem."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from getp.cli import loading
from getp.cli.settings import Settings
from getp.files import STDIO, write_report
from getp.terminal import print_message


def run(settings: Settings) -> int:
    """Check this machine; return 1 if a check fails. Raises GetpError."""
    from getp.analysis.doctor.examine import TYPICAL_MODEL, examine
    from model.families import load_config

    folder = loading.checkpoint_folder(settings).resolve()
    load_config(folder)  # raises CheckpointError for one that cannot be used
    models = [str(folder), *([TYPICAL_MODEL] if settings.checkpoint is None else [])]
    name = loading.checkpoint_name(settings)
    with _progress(is_shown=not settings.json) as progress:
        diagnosis = examine(name, tuple(models), settings.engine.device, progress)
    if settings.json:
        write_report(STDIO, diagnosis.as_json())
    else:
        from getp.analysis.doctor.table import print_diagnosis

        print_diagnosis(diagnosis)
    return 0 if diagnosis.is_ok else 1


@contextmanager
def _progress(is_shown: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows on a terminal's standard error what is running."""
    print_message(
        "getp: checking this machine; this takes about half a minute, or a few minutes if GPU "
        "kernels must be compiled"
    )
    if not is_shown:
        yield lambda text: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(escape(text))
