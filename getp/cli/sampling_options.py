"""The options of sampling and of the length of answers, in the order of the help."""

import click
from cloup import OptionGroup

from getp.cli.click_types import Decorator, Integer, Number, in_group
from getp.cli.modes import Subject
from getp.defaults import DEFAULT_MAX_LENGTH, DEFAULT_NEW_TOKENS

_sampling = in_group(OptionGroup("Sampling"), Subject.SAMPLING)
_length = in_group(OptionGroup("Length"), Subject.LENGTH)

SAMPLING_OPTIONS: tuple[Decorator, ...] = (
    _sampling(
        "-t",
        "--temperature",
        type=Number(min=0),
        help="Sampling temperature; 0 is greedy.  [default: the checkpoint's, else 0, or 1 for "
        "OpenAI's JSONL]",
    ),
    _sampling(
        "-p",
        "--top-p",
        type=Number(0, 1, min_open=True),
        help="Sample from the most likely tokens whose total probability reaches this value.  "
        "[default: the checkpoint's, else 1]",
    ),
    _sampling(
        "--top-k",
        type=Integer(0, 2**63 - 1),
        help="Sample from the K most likely tokens (0: all).  [default: the checkpoint's, else 0]",
    ),
    _sampling(
        "--min-p",
        type=Number(0, 1),
        help="Sample only tokens with at least this share of the highest probability.  "
        "[default: the checkpoint's, else 0]",
    ),
    _sampling(
        "--repetition-penalty",
        type=Number(0, 100, min_open=True),
        help="Make tokens of the prompt and the answer less likely (above 1).  "
        "[default: the checkpoint's, else 1]",
    ),
    _sampling(
        "--presence-penalty",
        type=Number(-2, 2),
        help="Subtract this from the logits of tokens that the answer has.  [default: 0]",
    ),
    _sampling(
        "--frequency-penalty",
        type=Number(-2, 2),
        help="Subtract this for each time that the answer has a token.  [default: 0]",
    ),
    _sampling(
        "--bad-words",
        metavar="TEXT",
        multiple=True,
        help="Never write this text. Can be repeated.",
    ),
    _sampling(
        "-s",
        "--seed",
        type=Integer(0, 2**63 - 1),
        help="Random seed; the same seed gives the same samples.  [default: random, printed]",
    ),
    _sampling(
        "--generation-config",
        subject=Subject.LENGTH,
        type=click.Choice(["auto", "none"]),
        default="auto",
        show_default=True,
        help="none: ignore the sampling and the length in the checkpoint's generation_config.json.",
    ),
    _length(
        "-n",
        "--max-length",
        subject=Subject.WINDOW,
        type=Integer(min=0),
        help="Maximum total tokens per request (prompt + answer; score: of a window of a long "
        "text); 0: the model's limit.  "
        f"[default: {DEFAULT_MAX_LENGTH}; the model's limit for JSONL, in chat, and with "
        "--max-new-tokens]",
    ),
    _length(
        "--steps", hidden=True, subject=Subject.WINDOW, type=Integer(min=0)
    ),  # the old name of --max-length
    _length(
        "--max-new-tokens",
        type=Integer(min=1),
        help="Maximum tokens generated per request.  [default: the checkpoint's, else "
        f"{DEFAULT_NEW_TOKENS} for JSONL]",
    ),
    _length(
        "--min-tokens",
        "min_new_tokens",
        type=Integer(min=0),
        help="Tokens before which an answer does not end.  [default: 0]",
    ),
    _length(
        "--thinking-budget",
        subject=Subject.STOPPING,
        type=Integer(min=0),
        metavar="N",
        help="Tokens after which a model that thinks must answer.  [default: no limit]",
    ),
    _length(
        "--stop",
        subject=Subject.STOPPING,
        metavar="TEXT",
        multiple=True,
        help="End an answer at this text. Can be repeated.",
    ),
    _length(
        "--ignore-eos",
        subject=Subject.STOPPING,
        is_flag=True,
        help="Do not stop at EOS (for benchmarking).",
    ),
    _length(
        "--stop-token-id",
        "stop_token_ids",
        subject=Subject.STOPPING,
        type=Integer(0, 2**31 - 1),
        metavar="ID",
        multiple=True,
        help="Also end an answer at this token. Can be repeated.",
    ),
    _length(
        "--include-stop",
        subject=Subject.STOPPING,
        is_flag=True,
        help="Keep the text or the token that ends an answer in its text.",
    ),
    _length(
        "--keep-special-tokens",
        subject=Subject.STOPPING,
        is_flag=True,
        help="Keep special tokens in the text of answers.",
    ),
)
