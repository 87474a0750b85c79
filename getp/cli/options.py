"""Every option of the command line, in the order of the help."""

from collections.abc import Callable
from typing import Any, TypeVar

import click
from cloup import OptionGroup

from getp import __version__
from getp.cli.click_types import (
    Adapter,
    Decorator,
    Device,
    Dtype,
    Integer,
    JsonObject,
    Number,
    Option,
    Replicas,
    Shard,
    Size,
    in_group,
)
from getp.cli.modes import MODES, Subject
from getp.cli.plan_options import PLAN_OPTIONS
from getp.cli.sampling_options import SAMPLING_OPTIONS
from getp.cli.serve_options import SERVE_OPTIONS
from model.config import KV_DTYPES, QUANTIZED

_MAX_SECONDS = 365 * 24 * 3600  # one year; Python cannot wait for much longer

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


def with_options(function: _Decorated) -> _Decorated:
    """Decorate a click command with all arguments and options."""
    for decorate in reversed(_ALL):
        function = decorate(function)
    return function


_JOB, _ENGINE, _HELP = OptionGroup("Job"), OptionGroup("Engine"), OptionGroup("Help")

_job = in_group(_JOB, Subject.JOB)
_resume = in_group(_JOB, Subject.RESUME)
_prompt = in_group(OptionGroup("Prompt"), Subject.PROMPT)
_engine = in_group(_ENGINE, Subject.ENGINE)
_batch = in_group(_ENGINE, Subject.BATCH)
_replicas = in_group(_ENGINE, Subject.REPLICAS)

_ALL: tuple[Decorator, ...] = (
    click.argument("checkpoint", required=False),
    _job(
        "-m",
        "--mode",
        subject=Subject.ANY,
        type=click.Choice(list(MODES)),
        default="generate",
        show_default=True,
        help="; ".join(f"{name}: {mode.help}" for name, mode in MODES.items()) + ".",
    ),
    _job(
        "-i",
        "--input",
        subject=Subject.INPUT,
        metavar="FILE|TEXT",
        help="generate, chat: the prompt. Other modes: the input file (-: standard input).",
    ),
    _job(
        "-o",
        "--output",
        subject=Subject.OUTPUT,
        metavar="FILE",
        help="Result file (-: standard output).",
    ),
    _job(
        "--output-format",
        type=click.Choice(["ids", "text", "jsonl", "parquet", "arrow", "csv", "tsv"]),
        help="ids: the token ids of an answer per line. text: its text, with newlines as \\n and "
        "backslashes as \\\\. jsonl: OpenAI batch responses. Others: a table with the columns of "
        "the input and of the answers.  [default: by the suffix of -o; otherwise ids]",
    ),
    _job(
        "--column",
        subject=Subject.TABLE,
        metavar="NAME",
        help="Column of an input table (Parquet, Arrow, CSV, TSV) that holds the prompts or "
        "messages.  [default: prompt or messages]",
    ),
    _job(
        "--id-column",
        subject=Subject.TABLE,
        metavar="NAME",
        help="Column that holds the ids of requests.",
    ),
    _job(
        "--parameter-column",
        subject=Subject.TABLE,
        metavar="FIELD[=NAME]",
        multiple=True,
        help="Column that holds a field of each request, such as max_tokens. Can be repeated.",
    ),
    _job(
        "--first",
        subject=Subject.TABLE,
        type=Integer(min=1),
        metavar="N",
        help="Run only the first N requests of the input.",
    ),
    _job(
        "--shard",
        type=Shard(),
        metavar="I/N",
        help="Run only part I of N of the input, and add the numbers to the name of -o; "
        "-m merge joins the results.",
    ),
    _job(
        "--report",
        subject=Subject.REPORT,
        metavar="FILE.json|.html",
        help="Also write the report to this file, as JSON or as a page with figures.",
    ),
    _job(
        "--details",
        subject=Subject.DETAILS,
        is_flag=True,
        help="getp, plan, profile: also print the details and long tables.",
    ),
    _job(
        "--json",
        subject=Subject.JSON,
        is_flag=True,
        help="doctor: print one JSON object instead of tables.",
    ),
    _resume(
        "--restart", is_flag=True, help="Discard the journal and start over instead of resuming."
    ),
    _resume(
        "--accept-different-rounding",
        is_flag=True,
        help="In 16 bits, also resume a job that was started with other kernels or another kind of "
        "GPU, and run replicas on hosts that differ: nearly tied tokens may differ.",
    ),
    _resume(
        "--max-errors",
        type=Integer(min=0),
        help="Stop the job after more than N failed requests.  [default: never]",
        metavar="N",
    ),
    _job(
        "--truncate",
        type=click.Choice(["none", "left", "right"]),
        default="none",
        show_default=True,
        help="Cut prompts that are too long at their beginning (left) or end (right) instead of "
        "failing them; in a conversation, the longest message.",
    ),
    _resume(
        "--flush-interval",
        type=Number(0, _MAX_SECONDS),
        default=1.0,
        show_default=True,
        metavar="SECONDS",
        help="Seconds between fsyncs of the journal (0: after every request).",
    ),
    _job(
        "--grace",
        subject=Subject.GRACE,
        type=Number(0, _MAX_SECONDS),
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="Seconds that running requests get to finish after Ctrl-C or SIGTERM.",
    ),
    _job(
        "--schedule",
        type=click.Choice(["throughput", "first"]),
        default="throughput",
        show_default=True,
        help="throughput: group requests with a common prefix and start long ones first. "
        "first: run requests in input order. The results are the same.",
    ),
    _job(
        "--line",
        subject=Subject.LINE,
        type=int,
        metavar="N",
        help="decode: print only answer N (from 1), unescaped. Without it, every answer is printed "
        "on one line, with newlines as \\n and backslashes as \\\\.",
    ),
    _job(
        "--reference",
        subject=Subject.REFERENCE,
        metavar="FILE",
        help="getp, eval: result file to compare the results with.",
    ),
    _job(
        "--require-agreement",
        subject=Subject.REFERENCE,
        type=Number(0, 1),
        metavar="SHARE",
        help="Fail unless this share of the answers, such as 0.99, equals the reference.",
    ),
    _job(
        "--expected",
        subject=Subject.EVALUATION,
        metavar="FILE",
        help="eval: expected texts, one per line (the first line may be their number).",
    ),
    _prompt(
        "-z",
        "--tokenizer",
        subject=Subject.ANY,
        metavar="FILE|FOLDER|NAME",
        help="Another tokenizer.json, tokenizer directory or model's name on the hub.  "
        "[default: the checkpoint's]",
    ),
    _prompt("-y", "--system", metavar="TEXT", help="System prompt (needs the chat template)."),
    _prompt(
        "--chat-template/--raw",
        "chat_template",
        default=None,
        help="Apply the model's chat template to prompts, or use them as they are.  "
        "[default: in generate and chat the template, if the model has one; otherwise --raw]",
    ),
    _prompt(
        "--reasoning-effort",
        metavar="LEVEL",
        help="How much the model thinks, such as low, medium or high; none turns thinking off "
        "where the chat template can.",
    ),
    _prompt(
        "--chat-template-kwargs",
        type=JsonObject(),
        default="{}",
        metavar="JSON",
        help="Variables of the chat template, such as '{\"enable_thinking\": false}'.",
    ),
    *SAMPLING_OPTIONS,
    _engine(
        "--device",
        subject=Subject.DEVICE,
        type=Device(),
        default="auto",
        show_default=True,
        help="auto, cpu, cuda or cuda:N; auto uses the first available GPU, or the CPU.",
    ),
    _engine(
        "--dtype",
        subject=Subject.DTYPE,
        type=Dtype(),
        default="auto",
        show_default=True,
        help="Compute dtype; auto: the checkpoint's. float8 only in mode plan.",
    ),
    _engine(
        "--kv-dtype",
        subject=Subject.DTYPE,
        type=click.Choice(["auto", *KV_DTYPES]),
        default="auto",
        show_default=True,
        help="Dtype of the KV cache; auto: the compute dtype. fp8 (e4m3; on GPUs that have it) and "
        "int8 (on CPUs) hold about twice as many tokens as bfloat16, but are less exact.",
    ),
    _engine(
        "--quantize",
        subject=Subject.DTYPE,
        type=click.Choice([*QUANTIZED]),
        help="Convert 16-bit weights as they are loaded, with less memory and less precision: on a "
        "CPU to int8 (a scale for each output) or int4 (one for each 32 inputs), which are faster; "
        "on a GPU to fp8 (e4m3; a scale for each output; slow on a CPU). The head becomes int8 or "
        "fp8; the embedding keeps its dtype (if they are tied, the head is a copy).  "
        "[default: keep the checkpoint's]",
    ),
    _batch("--max-batch-size", type=Integer(min=1), help="Maximum concurrent requests."),
    _batch("--max-batch-tokens", type=Integer(min=1), help="Maximum tokens computed in one step."),
    _engine("--kv-memory", type=Size(), help="Memory of the KV cache, such as 4GiB."),
    _engine(
        "--block-size",
        type=Integer(min=1),
        default=16,
        show_default=True,
        help="Token positions per KV cache block.",
    ),
    _engine(
        "--no-prefix-cache",
        "prefix_cache",
        flag_value=False,
        default=True,
        help="Disable prefix caching.",
    ),
    _engine(
        "--no-speculation",
        "speculation",
        flag_value=False,
        default=True,
        help="Disable speculative decoding (prompt lookup), used on a CPU while few requests run. "
        "Results are the same either way.",
    ),
    _batch(
        "-tp",
        "--tensor-parallel",
        type=Integer(1, 1024),
        metavar="N",
        help="Split the model across N GPUs (on a CPU: N processes); `torchrun --nproc-per-node N` "
        "does the same. In mode plan, the figures of an operation are for one GPU.  [default: 1]",
    ),
    _engine(
        "--adapter",
        type=Adapter(),
        metavar="DIR[:WEIGHT]",
        multiple=True,
        help="Add a LoRA adapter in PEFT's format to the weights, times WEIGHT.  [default: 1]  "
        "Can be repeated.",
    ),
    _engine(
        "--dummy-weights",
        is_flag=True,
        help="Use random weights; no *.safetensors file is needed.",
    ),
    _engine(
        "--trust-kernels",
        is_flag=True,
        help="On a GPU, use the default kernels: do not check them, and do not time alternatives.",
    ),
    _replicas(
        "--replicas",
        type=Replicas(),
        metavar="N|auto",
        help="Run N engines, each on its own GPU or a share of the CPU cores; auto: one per GPU, "
        "or one per host without GPUs. Needs Ray: pip install 'getp[cluster]'.  "
        "[default: one engine, without Ray]",
    ),
    _replicas(
        "--ray-address",
        metavar="HOST:PORT",
        help="Run the replicas on this Ray cluster (auto: the one of this host).  "
        "[default: a private Ray instance on this host]",
    ),
    *SERVE_OPTIONS,
    *PLAN_OPTIONS,
    in_group(_HELP)("--debug", is_flag=True, help="Show tracebacks."),
    click.version_option(
        __version__, prog_name="getp", message="%(prog)s %(version)s", cls=Option, group=_HELP
    ),
    click.help_option("-h", "--help", cls=Option, group=_HELP),
)
