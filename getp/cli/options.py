"""Every option of the command line, in the order of the help."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from getp import __version__
from getp.cli.click_types import Device, Dtype, Number, Option, Replicas, Size

MODES = ("generate", "chat", "getp", "decode", "eval", "plan", "profile")
_ASKING = ("generate", "chat", "getp")  # the modes that run the model
_COUNTING = (*_ASKING, "plan")  # and the one that foresees what they would take
_MEASURED = (*_ASKING, "profile")  # and the one that measures it
_DEFAULT_STEPS = 1024
_YEAR = 365 * 24 * 3600  # seconds; Python's own limit for a wait is not far above
_MANY = 2**20  # more of anything in one step is a mistake

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
_Decorator = Callable[[Any], Any]


def with_options(function: _Decorated) -> _Decorated:
    """Decorate a click command with all arguments and options."""
    for decorate in reversed(_ALL):
        function = decorate(function)
    return function


def most_positions(steps: int | None, max_new_tokens: int | None) -> int | None:
    """Return the most positions of a request by -n and --max-new-tokens; None: the model's limit.

    Without -n a length that was asked for counts alone: no default may cut it.
    """
    if steps is None:
        return _DEFAULT_STEPS if max_new_tokens is None else None
    return steps or None


def _in(group: str, modes: tuple[str, ...] = ()) -> Callable[..., _Decorator]:
    """Return click.option for one group of options, for these modes (none: all)."""

    def option(*names: str, **rest: Any) -> _Decorator:
        return click.option(*names, cls=Option, group=group, **{"modes": modes, **rest})

    return option


_job = _in("Job")
_prompt = _in("Prompt", _COUNTING)
_sampling = _in("Sampling", _ASKING)
_length = _in("Length", _ASKING)
_engine = _in("Engine", _MEASURED)
_plan = _in("Plan", ("plan",))
_step = _in("Plan", ("plan", "profile"))
_help = _in("Help")

_ALL: tuple[_Decorator, ...] = (
    click.argument("checkpoint", required=False),
    _job(
        "-m",
        "--mode",
        type=click.Choice(MODES),
        default="generate",
        show_default=True,
        help="generate: one answer. chat: a conversation. getp: a file of prompts. "
        "decode: a token file to text. eval: a token file against a reference. "
        "plan: what a step or a job costs and how fast GPUs can do it. "
        "profile: where the time of a step goes, measured, and what would help.",
    ),
    _job(
        "-i",
        "--input",
        metavar="FILE|TEXT",
        help="getp, decode, eval, plan: a file (-: standard input). generate, chat: the prompt.",
    ),
    _job(
        "-o",
        "--output",
        metavar="FILE",
        modes=("getp", "decode"),
        help="Result file (-: standard output).",
    ),
    _job(
        "--report",
        metavar="FILE.json",
        modes=("getp", "eval"),
        help="Write the report as JSON as well.",
    ),
    _job(
        "--restart",
        is_flag=True,
        modes=("getp",),
        help="Begin again instead of going on where an earlier run of this job ended.",
    ),
    _job(
        "--max-errors",
        type=click.IntRange(min=0),
        modes=("getp",),
        help="End the job when more requests than this have failed.  [default: never]",
    ),
    _job(
        "--flush-interval",
        type=Number(0, _YEAR),
        default=1.0,
        show_default=True,
        modes=("getp",),
        help="Seconds until a finished request is safe from a power failure; 0: at once. "
        "From the end of the process it is safe at once.",
    ),
    _job(
        "--grace",
        type=Number(0, _YEAR),
        default=10.0,
        show_default=True,
        modes=("getp",),
        help="Seconds that running requests have to finish after Ctrl-C or SIGTERM.",
    ),
    _job(
        "--schedule",
        type=click.Choice(["throughput", "first"]),
        default="throughput",
        show_default=True,
        modes=("getp",),
        help="throughput: of the requests read ahead, those that share a beginning run together, "
        "long answers early. first: in the order of the input, so that its first results come "
        "first. The result is the same.",
    ),
    _job(
        "--line",
        type=int,
        modes=("decode",),
        help="decode: only this line, from 1. Otherwise all, one a line, with newlines inside "
        "a text written as \\n.",
    ),
    _job("--reference", metavar="FILE", modes=("eval",), help="eval: a token file to agree with."),
    _job(
        "--expected",
        metavar="FILE",
        modes=("eval",),
        help="eval: the expected texts, one a line (a first line with their number is allowed).",
    ),
    _prompt(
        "-z",
        "--tokenizer",
        type=click.Path(exists=True),
        modes=(),
        help="Another tokenizer.json or directory.  [default: the checkpoint's]",
    ),
    _prompt("-y", "--system", metavar="TEXT", help="System prompt (with the chat template)."),
    _prompt(
        "--chat-template/--raw",
        "chat_template",
        default=None,
        help="Put prompts into the checkpoint's chat template, or take them as they are.  "
        "[default: raw, in chat the template]",
    ),
    _sampling(
        "-t",
        "--temperature",
        type=Number(min=0),
        default=0.0,
        show_default=True,
        help="0 is greedy.",
    ),
    _sampling(
        "-p",
        "--top-p",
        type=Number(0, 1, min_open=True),
        default=0.9,
        show_default=True,
        help="Sample from the likeliest tokens that together have this probability.",
    ),
    _sampling(
        "--top-k",
        type=click.IntRange(0, 2**63 - 1),
        default=0,
        show_default=True,
        help="Sample from this many likeliest tokens; 0: from all.",
    ),
    _sampling(
        "-s",
        "--seed",
        type=click.IntRange(0, 2**63 - 1),
        help="The same seed samples the same.  [default: random, printed]",
    ),
    _length(
        "-n",
        "--steps",
        type=click.IntRange(min=0),
        modes=_COUNTING,
        help="Most positions of one request, prompt included; 0: the model's limit.  "
        f"[default: {_DEFAULT_STEPS}; the model's limit where --max-new-tokens or the request "
        "itself says how long an answer may be]",
    ),
    _length(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        modes=_COUNTING,
        help="Most tokens of one answer.",
    ),
    _length(
        "--stop",
        metavar="TEXT",
        multiple=True,
        help="End an answer at this text. May be repeated.",
    ),
    _length("--ignore-eos", is_flag=True, help="Go on after stop tokens, for timing."),
    _engine(
        "--device",
        type=Device(),
        default="auto",
        show_default=True,
        help="auto, cpu, cuda or cuda:1.",
    ),
    _engine(
        "--dtype",
        type=Dtype(),
        default="auto",
        show_default=True,
        modes=(*_COUNTING, "profile"),
        help="What to compute in: auto, bfloat16, float16, float32; in plan also float8.",
    ),
    _engine(
        "--max-batch-size",
        type=click.IntRange(min=1),
        modes=_COUNTING,
        help="Most requests at a time.",
    ),
    _engine(
        "--max-batch-tokens",
        type=click.IntRange(min=1),
        modes=_COUNTING,
        help="Most tokens in one step.",
    ),
    _engine("--kv-memory", type=Size(), help="Memory for the KV cache, such as 4GiB."),
    _engine(
        "--block-size",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="Positions in one block of the KV cache.",
    ),
    _engine("--no-prefix-cache", is_flag=True, help="Compute equal beginnings of prompts again."),
    _engine(
        "--tensor-parallel",
        type=click.IntRange(1, 1024),
        metavar="N",
        modes=_COUNTING,
        help="Share the model out among N GPUs, or N processes on a CPU. `torchrun "
        "--nproc-per-node N` does the same. In plan, figures of an operation are one GPU's.  "
        "[default: 1]",
    ),
    _engine("--dummy-weights", is_flag=True, help="Random weights from config.json, for timing."),
    _engine(
        "--replicas",
        type=Replicas(),
        modes=("getp",),
        help="Run N engines, each on a GPU of its own, or share out the cores; auto: one for each "
        "GPU, else one a host. Needs Ray: pip install 'getp[cluster]'.  [default: one engine, "
        "without Ray]",
    ),
    _engine(
        "--ray-address",
        metavar="HOST:PORT",
        modes=("getp",),
        help="Run the replicas on this Ray cluster (auto: the one of this host).  [default: a "
        "Ray of its own, on this host]",
    ),
    _step(
        "--phase",
        type=click.Choice(["prefill", "decode", "backward"]),
        help="Which step to plan; prefill or decode to profile.  [default: decode]",
    ),
    _step("--batch", type=click.IntRange(1, _MANY), help="Sequences in it.  [default: 1]"),
    _step(
        "--query",
        type=click.IntRange(1, _MANY),
        help="New tokens of each.  [default: 1 in decode, else 1024]",
    ),
    _step(
        "--context",
        type=click.IntRange(1, _MANY),
        help="Positions of each, new ones included.  [default: 1024 in decode, else the query]",
    ),
    _plan("--fused", is_flag=True, help="Activations stay on the chip within a layer's blocks."),
    _step(
        "--gpu",
        metavar="NAME",
        multiple=True,
        help="A GPU of the table, local (this machine, measured) or all. May be repeated.",
    ),
    _step(
        "--measure",
        is_flag=True,
        help="Measure this machine again, best while nothing else runs: its peaks are kept.",
    ),
    _plan(
        "--price",
        type=Number(min=0),
        multiple=True,
        help="Of a GPU for an hour, with -i; one for all, or one for each --gpu.",
    ),
    _step(
        "--format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="How to print it.",
    ),
    _plan(
        "--plot",
        metavar="FILE.png|.svg",
        help="Draw the roofline with the operations on it (-: on the terminal).",
    ),
    _in("Plan", ("profile",))(
        "--trace", metavar="FILE.json", help="Write a Chrome trace of one step, part by part."
    ),
    _help("--debug", is_flag=True, help="Show where an error came from."),
    click.version_option(__version__, prog_name="getp", message="%(prog)s %(version)s"),
)
