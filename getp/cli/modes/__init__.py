"""The modes of the command line: one file each, and one line in the table `MODES`."""

from dataclasses import dataclass
from enum import Flag, auto
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from getp.cli.settings import Settings


class Subject(Flag):
    """The subject of an option. An option applies to the modes that list its subject."""

    ANY = 0  # applies to every mode
    INPUT = auto()
    OUTPUT = auto()
    REPORT = auto()
    DETAILS = auto()
    JOB = auto()
    RESUME = auto()
    REPLICAS = auto()
    LINE = auto()
    EVALUATION = auto()
    PROMPT = auto()
    SAMPLING = auto()
    STOPPING = auto()
    LENGTH = auto()
    WINDOW = auto()
    DTYPE = auto()
    BATCH = auto()
    DEVICE = auto()
    ENGINE = auto()
    STEP = auto()
    PLAN = auto()
    TRACE = auto()
    JSON = auto()
    TABLE = auto()
    REFERENCE = auto()
    PRICE = auto()
    GRACE = auto()
    SERVE = auto()


_S = Subject
_COMPLETES = (
    _S.INPUT
    | _S.PROMPT
    | _S.SAMPLING
    | _S.STOPPING
    | _S.LENGTH
    | _S.WINDOW
    | _S.DTYPE
    | _S.BATCH
    | _S.DEVICE
    | _S.ENGINE
)  # modes that complete prompts


@dataclass(frozen=True)
class Mode:
    """A mode: the module with its `run` function, its line in the help, and its options."""

    module: str
    help: str
    subjects: Subject

    def run(self, settings: "Settings") -> int:
        """Run the mode and return the exit status. Raises GetpError and errors of the engine."""
        status: int = import_module(f"{__name__}.{self.module}").run(settings)
        return status


MODES = {
    "generate": Mode("generate", "complete one prompt", _COMPLETES),
    "chat": Mode("chat", "interactive chat", _COMPLETES),
    "getp": Mode(
        "job",
        "complete a file of prompts",
        _COMPLETES
        | _S.OUTPUT
        | _S.REPORT
        | _S.DETAILS
        | _S.JOB
        | _S.RESUME
        | _S.REPLICAS
        | _S.TABLE
        | _S.REFERENCE
        | _S.PRICE
        | _S.GRACE,
    ),
    "serve": Mode(
        "serve",
        "serve OpenAI's API, with batches",
        (_COMPLETES & ~_S.INPUT & ~_S.PROMPT) | _S.REPLICAS | _S.GRACE | _S.SERVE,
    ),
    "score": Mode(
        "score",
        "log-likelihood and perplexity of given texts",
        _S.INPUT
        | _S.OUTPUT
        | _S.REPORT
        | _S.RESUME
        | _S.REPLICAS
        | _S.WINDOW
        | _S.DTYPE
        | _S.BATCH
        | _S.DEVICE
        | _S.ENGINE
        | _S.GRACE,
    ),
    "decode": Mode(
        "decode", "print the answers of a result file as text", _S.INPUT | _S.OUTPUT | _S.LINE
    ),
    "eval": Mode(
        "evaluate",
        "compare a result file with a reference",
        _S.INPUT | _S.REPORT | _S.EVALUATION | _S.REFERENCE,
    ),
    "merge": Mode("merge", "join the results of all shards of a job", _S.OUTPUT),
    "plan": Mode(
        "plan",
        "estimate the cost and speed of a step or a job on GPUs",
        _S.INPUT
        | _S.PROMPT
        | _S.LENGTH
        | _S.WINDOW
        | _S.DTYPE
        | _S.BATCH
        | _S.STEP
        | _S.PLAN
        | _S.DETAILS
        | _S.TABLE
        | _S.PRICE,
    ),
    "profile": Mode(
        "profile",
        "measure where the time of a step goes",
        _S.DTYPE | _S.DEVICE | _S.ENGINE | _S.STEP | _S.TRACE | _S.DETAILS,
    ),
    "doctor": Mode(
        "doctor",
        "check that this machine works correctly, and measure its speed",
        _S.DEVICE | _S.JSON,
    ),
}
