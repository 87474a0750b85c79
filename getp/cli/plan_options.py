"""The options of modes plan and profile, in the order of the help."""

import click
from cloup import OptionGroup

from getp.cli.click_types import Decorator, Integer, Number, in_group
from getp.cli.modes import Subject

_MAX_STEP_SIZE = 2**20  # a larger batch, query or context is a typing error

_PLAN = OptionGroup("Plan")
_step = in_group(_PLAN, Subject.STEP)
_plan = in_group(_PLAN, Subject.PLAN)

PLAN_OPTIONS: tuple[Decorator, ...] = (
    _step(
        "--phase",
        type=click.Choice(["prefill", "decode", "backward"]),
        help="Phase to plan, or to profile (prefill or decode).  [default: decode]",
    ),
    _step("--batch", type=Integer(1, _MAX_STEP_SIZE), help="Sequences in the step.  [default: 1]"),
    _step(
        "--query",
        type=Integer(1, _MAX_STEP_SIZE),
        help="New tokens per sequence.  [default: 1 in decode, otherwise 1024]",
    ),
    _step(
        "--context",
        type=Integer(1, _MAX_STEP_SIZE),
        help="Context length per sequence, new tokens included.  "
        "[default: 1024 in decode, otherwise --query]",
    ),
    _plan(
        "--fused",
        is_flag=True,
        help="Assume fused kernels: less activation traffic, fewer launches.",
    ),
    _step(
        "--gpu",
        metavar="NAME",
        multiple=True,
        help="GPU such as H200; all: every known one; local: this machine, measured. Can be "
        "repeated.  [default: several common ones]",
    ),
    _step(
        "--measure",
        is_flag=True,
        help="Measure this machine's peaks again and store them; run it on an otherwise idle "
        "machine.",
    ),
    _plan(
        "--price",
        subject=Subject.PRICE,
        type=Number(min=0),
        multiple=True,
        help="Price of a GPU (in getp: or a host) per hour, to state the cost of the job. plan: "
        "with -i; give one, or one per --gpu.",
    ),
    _step(
        "--format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Output format.",
    ),
    _plan(
        "--plot",
        metavar="FILE.png|.svg",
        help="Draw a roofline plot with the operations (-: on the terminal).",
    ),
    _step(
        "--trace",
        subject=Subject.TRACE,
        metavar="FILE.json",
        help="Write a Chrome trace of one step, part by part.",
    ),
)
