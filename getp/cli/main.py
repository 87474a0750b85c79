"""The command: parse the options, run the mode, turn errors into one line and an exit status."""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import click
import cloup

from getp.cli.click_types import Command, refuse_other_modes
from getp.cli.loading import find_files
from getp.cli.modes import MODES
from getp.cli.options import with_options
from getp.cli.settings import settings_of
from getp.cli.wording import option_name
from getp.errors import GetpError, Interrupted, UsageProblem, worded
from getp.standard_streams import open_closed_streams
from getp.terminal import discard_output, print_message, warn


@cloup.command(cls=Command, add_help_option=False)
@with_options
@click.pass_context
def command(ctx: click.Context, **given: Any) -> int:
    """Run language models on files of prompts, at the highest throughput the hardware allows.

    CHECKPOINT is a Hugging Face model directory, a GGUF file, or the name of a model on the Hugging
    Face Hub, OWNER/NAME or OWNER/NAME@REVISION, which is downloaded if it is not in the local
    cache. Without it, the small model that comes with getp runs. Mode plan also takes a
    config.json or the usual name of a well-known model.
    """
    mode = given["mode"]
    refuse_other_modes(ctx, mode)
    if given["dtype"] == "float8" and mode != "plan":
        raise UsageProblem(
            "--dtype float8 is only available in -m plan; use bfloat16, float16 or float32"
        )
    return MODES[mode].run(find_files(settings_of(given)))


def run(args: Sequence[str]) -> int:
    """Run the command line and return its exit status; errors become one line each."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        status = command.main(list(args), prog_name="getp", standalone_mode=False)
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:  # the reader of the pipe has exited: `getp … | head`
        discard_output()
        return 1
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code, hint=True)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", Interrupted("").exit_code)
    except Exception as error:
        if "--debug" in args:
            print_message(traceback.format_exc())
        status = error.exit_code if isinstance(error, GetpError) else 1
        return _fail(_message(error), status, hint=isinstance(error, UsageProblem))


def _show_warning(message: Warning | str, *where: object) -> None:
    warn(str(message))


def _message(error: Exception) -> str:
    """Return the message for the user; an unexpected error is shown with its type."""
    from tokenizer import TokenizerError

    if isinstance(error, (GetpError, TokenizerError, OSError)):
        return worded(error, option_name)
    from engine import EngineError
    from model import CheckpointError
    from model.ops.cpu.bindings import KernelsError

    if isinstance(error, (CheckpointError, EngineError, KernelsError)):
        return worded(error, option_name)
    return f"{type(error).__name__}: {error} (use --debug for a traceback)"


def _fail(message: str, status: int, hint: bool = False) -> int:
    print_message(f"getp: error: {' '.join(message.split())}")
    if hint:
        print_message("getp --help lists the options")
    return status


def main() -> None:
    """Run the command of this process and exit with its status."""
    open_closed_streams()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # The program must not end at an invalid byte or a character that the locale lacks.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(_with_torchrun(sys.argv[1:]))


def _with_torchrun(args: Sequence[str]) -> int:
    """Run the command line; under torchrun, run it in rank 0 and serve it in the other ranks."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torch need not be imported
        return run(args)
    from engine.parallel import channel, worker

    if channel.torchrun_rank():
        worker.serve_torchrun()
        return 0
    try:
        return run(args)
    finally:
        if channel.torchrun_size() > 1:
            worker.dismiss_torchrun()
