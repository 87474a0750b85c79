"""The command line: options → settings, one function a mode.

torch takes a second to import, so what needs it is imported by the mode that does: a typing
mistake is answered at once.
"""

import os
import secrets
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from getp import EMBEDDED
from getp.cli.click_types import Command, refuse_other_modes
from getp.cli.options import most_positions, with_options
from getp.errors import GetpError, Interrupted, UsageProblem
from getp.terminal import say

if TYPE_CHECKING:
    from engine import Engine, EngineConfig, SamplingParams
    from getp.cluster.driver import Cluster
    from tokenizer import Tokenizer


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@with_options
@click.pass_context
def command(ctx: click.Context, **given: Any) -> int:
    """Run language models on files of prompts as fast as the hardware allows.

    CHECKPOINT is a Hugging Face model directory. Without one, the small model that comes with
    getp runs.
    """
    refuse_other_modes(ctx, given["mode"])
    if given["mode"] != "plan":
        _check_checkpoint_and_dtype(given["checkpoint"], given["dtype"], ctx)
    modes = {
        "generate": _generate,
        "chat": _chat,
        "getp": _getp,
        "decode": _decode,
        "eval": _eval,
        "plan": _plan,
        "profile": _profile,
    }
    return modes[given["mode"]](SimpleNamespace(**given))


def _getp(options: SimpleNamespace) -> int:
    _need(options, "input", "-i/--input FILE")
    _need(options, "output", "-o/--output FILE")
    _check_system(options)
    if options.ray_address is not None and options.replicas is None:
        raise UsageProblem("--ray-address needs --replicas N or --replicas auto")
    from getp import fingerprint
    from getp.job import run as batch
    from getp.job.request_reader import Defaults

    tokenizer = _load_tokenizer(options)
    params = _sampling_params(options, tokenizer)
    job = batch.Job(
        input=options.input,
        output=options.output,
        checkpoint=_checkpoint_name(options),
        defaults=Defaults(
            params,
            options.stop,
            bool(options.chat_template),
            options.system,
            capped=options.steps is not None,
        ),
        seed_given=options.seed is not None,
        identity={
            "checkpoint": fingerprint.of_checkpoint(_checkpoint(options)),
            "tokenizer": fingerprint.of_tokenizer(Path(options.tokenizer or _checkpoint(options))),
            "weights": "dummy" if options.dummy_weights else "the checkpoint's",
        },
        report=options.report,
        restart=options.restart,
        flush_s=options.flush_interval,
        grace_s=options.grace,
        max_errors=options.max_errors,
        schedule=options.schedule,
    )
    source = batch.read(job)
    if options.replicas is None:
        return batch.run_job(job, source, tokenizer, load_engine(options))
    with closing(_load_cluster(options)) as cluster:
        return batch.run_job(job, source, tokenizer, cluster)


def _generate(options: SimpleNamespace) -> int:
    _check_system(options)
    from getp.text import chat_session as chat

    text = chat.prompt_text(options.input)
    tokenizer = _load_tokenizer(options)
    settings = _chat_settings(options, tokenizer, bool(options.chat_template))
    options.max_batch_size = options.max_batch_size or 1
    chat.generate(settings, text, tokenizer, load_engine(options))
    return 0


def _chat(options: SimpleNamespace) -> int:
    if options.chat_template is False:
        raise UsageProblem("--raw does nothing in mode chat: a chat needs the chat template")
    from getp.text import chat_session as chat

    tokenizer = _load_tokenizer(options)
    settings = _chat_settings(options, tokenizer, True)
    options.max_batch_size = options.max_batch_size or 1
    chat.chat(settings, options.input, tokenizer, load_engine(options))
    return 0


def _decode(options: SimpleNamespace) -> int:
    _need(options, "input", "-i/--input FILE")
    from getp import files
    from getp.job import evaluate

    output = options.output or files.STANDARD
    files.check_writable(output, [options.input])
    evaluate.decode_file(options.input, output, _load_tokenizer(options), options.line)
    return 0


def _eval(options: SimpleNamespace) -> int:
    _need(options, "input", "-i/--input FILE")
    if options.reference is None and options.expected is None:
        raise UsageProblem("mode eval needs --reference FILE or --expected FILE")
    from getp import files
    from getp.job import evaluate

    if options.report is not None:
        read = (options.input, options.reference, options.expected)
        files.check_writable(options.report, [path for path in read if path is not None])
    tokenizer = _load_tokenizer(options) if options.expected is not None else None
    outcome = evaluate.evaluate(
        options.input,
        options.reference,
        options.expected,
        tokenizer,
        aside=options.report == files.STANDARD,
    )
    if options.report is not None:
        files.write_report(options.report, outcome)
    return 0


def _plan(options: SimpleNamespace) -> int:
    _check_system(options)
    from getp.cli import plan as cli_plan

    return cli_plan.run(options, _checkpoint(options))


def _profile(options: SimpleNamespace) -> int:
    from getp.cli import profile as cli_profile

    return cli_profile.run(options, _checkpoint(options), _checkpoint_name(options), load_engine)


def load_engine(options: SimpleNamespace) -> "Engine":
    """Make the engine the options ask for; it loads its weights when it warms up."""
    import torch

    from engine import Engine
    from engine.parallel import channel as link

    ranks = link.torchrun_size()
    if ranks > 1 and options.tensor_parallel not in (None, ranks):
        raise UsageProblem(
            f"--tensor-parallel {options.tensor_parallel}, but torchrun has started {ranks} "
            "processes: leave the option out"
        )
    ranks = options.tensor_parallel or ranks
    _check_ranks(options, ranks)
    if options.device.startswith("cuda"):
        index, count = torch.device(options.device).index or 0, torch.cuda.device_count()
        if index >= count:
            raise UsageProblem(f"--device {options.device}: torch finds {count} GPUs here")
    return Engine(
        _checkpoint(options),
        _engine_config(options, ranks),
        notice=lambda message: say(f"getp: warning: {message}"),
    )


def _check_ranks(options: SimpleNamespace, ranks: int) -> None:
    """Raise UsageProblem where the model cannot be shared among so many."""
    from model import load_config
    from model.cost.operations import check_tensor_parallel

    try:
        check_tensor_parallel(load_config(_checkpoint(options)), ranks)
    except ValueError as error:
        raise UsageProblem(f"--tensor-parallel {ranks}: {error}") from None


def _load_cluster(options: SimpleNamespace) -> "Cluster":
    """Make the replicas the options ask for; they load their weights when they warm up."""
    from engine.parallel import channel as link
    from getp.cluster.driver import Cluster

    if link.torchrun_size() > 1:
        raise UsageProblem(
            "--replicas starts its processes itself: leave torchrun out, and give "
            "--tensor-parallel N to share each replica's model among N"
        )
    _check_ranks(options, options.tensor_parallel or 1)
    return Cluster(
        _checkpoint(options),
        Path(options.tokenizer or _checkpoint(options)),
        options.replicas or None,
        _engine_config(options, options.tensor_parallel or 1),
        address=options.ray_address,
    )


def _engine_config(options: SimpleNamespace, tensor_parallel: int) -> "EngineConfig":
    from engine import EngineConfig

    return EngineConfig(
        device=options.device,
        dtype=options.dtype,
        max_batch_size=options.max_batch_size,
        max_batch_tokens=options.max_batch_tokens,
        kv_memory=options.kv_memory,
        block_size=options.block_size,
        prefix_cache=not options.no_prefix_cache,
        dummy_weights=options.dummy_weights,
        tensor_parallel=tensor_parallel,
    )


def _load_tokenizer(options: SimpleNamespace) -> "Tokenizer":
    from tokenizer import Tokenizer

    return Tokenizer.load(options.tokenizer or _checkpoint(options))


def _chat_settings(options: SimpleNamespace, tokenizer: "Tokenizer", chat: bool) -> Any:
    from getp.text.chat_session import Settings

    params = _sampling_params(options, tokenizer)
    return Settings(params, stops=options.stop, chat=chat, system=options.system)


def _sampling_params(options: SimpleNamespace, tokenizer: "Tokenizer") -> "SamplingParams":
    from engine import SamplingParams

    if "" in options.stop:
        raise UsageProblem("--stop must not be empty")
    seed = options.seed
    if seed is None and options.temperature > 0:
        seed = secrets.randbelow(2**32)
    params = SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=seed or 0,
        max_new_tokens=options.max_new_tokens,
        max_positions=most_positions(options.steps, options.max_new_tokens),
        stop_ids=frozenset() if options.ignore_eos else tokenizer.stop_ids,
        ignore_eos=options.ignore_eos,
    )
    if seed != options.seed:
        print(f"getp: seed {seed}", file=sys.stderr)
    return params


def _checkpoint(options: SimpleNamespace) -> Path:
    """Return the given checkpoint, else the embedded model: in the package, or in the source."""
    if options.checkpoint is not None:
        return Path(options.checkpoint)
    package = Path(__file__).parents[1]
    for folder in (package / "data" / "model", package.parent / "data" / "model"):
        if folder.is_dir():
            return folder
    raise GetpError("the embedded model is missing from this installation: give a CHECKPOINT")


def _check_checkpoint_and_dtype(checkpoint: str | None, dtype: str, ctx: click.Context) -> None:
    """Refuse what only a plan can do without: the weights, and units for float8."""
    if checkpoint is not None:
        argument = next(p for p in ctx.command.params if p.name == "checkpoint")
        click.Path(exists=True, file_okay=False).convert(checkpoint, argument, ctx)
    if dtype == "float8":
        raise UsageProblem(
            "--dtype float8 is for mode plan; computed in are 'bfloat16', 'float16', 'float32'"
        )


def _checkpoint_name(options: SimpleNamespace) -> str:
    if options.checkpoint is None:
        return EMBEDDED
    return Path(options.checkpoint).resolve().name


def _need(options: SimpleNamespace, name: str, shown: str) -> None:
    if getattr(options, name) is None:
        raise UsageProblem(f"mode {options.mode} needs {shown}")


def _check_system(options: SimpleNamespace) -> None:
    if options.system is not None and not options.chat_template:
        raise UsageProblem(f"-y/--system needs --chat-template in mode {options.mode}")


def run(args: Sequence[str]) -> int:
    """Run the command line and return its exit status; errors become one line each."""
    warnings.showwarning = _warn  # type: ignore[assignment]
    try:
        status = command.main(list(args), prog_name="getp", standalone_mode=False)
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:  # the reader has gone: `getp … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code, hint=True)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", Interrupted("").exit_code)
    except Exception as error:
        if "--debug" in args:
            say(traceback.format_exc())
        status = error.exit_code if isinstance(error, GetpError) else 1
        return _fail(_message(error), status, hint=isinstance(error, UsageProblem))


def _warn(message: Warning | str, *where: object) -> None:
    say(f"getp: warning: {message}")


def _message(error: Exception) -> str:
    from tokenizer import TokenizerError

    if isinstance(error, (GetpError, TokenizerError, OSError)):
        return str(error)
    from engine import EngineError
    from model import CheckpointError
    from model.ops.cpu.bindings import KernelsError

    if isinstance(error, (CheckpointError, EngineError, KernelsError)):
        return str(error)
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _fail(message: str, status: int, hint: bool = False) -> int:
    say(f"getp: error: {' '.join(message.split())}")
    if hint:
        say("getp --help lists the options")
    return status


def main() -> None:
    """Be the `getp` command."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # A model writes any character and a pipe brings any byte; neither may end the program.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(_with_torchrun(sys.argv[1:]))


def _with_torchrun(args: Sequence[str]) -> int:
    """Run the command line; of several processes that torchrun started, the first one does."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # nothing to import torch for
        return run(args)
    from engine.parallel import channel as link
    from engine.parallel import worker as rank

    if link.torchrun_rank():
        rank.serve_torchrun()
        return 0
    try:
        return run(args)
    finally:
        if link.torchrun_size() > 1:
            rank.dismiss_torchrun()
