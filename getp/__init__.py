"""The user interface: the command line, jobs on files of prompts, chat and reports.

Owns text, files and the terminal; never touches tensors. `getp.cli.main` is the command and
`getp.job.run` the main job. As a library:

    from getp import LLM, Engine, Grammar, Request, SamplingParams, Tokenizer

These names are imported lazily, so that `import getp` stays fast.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

EMBEDDED = "the embedded model"
"""The name of the model that comes with getp, in reports."""


def _check_packages() -> None:
    """Raise ImportError if a user's module hides one of getp's top-level packages.

    A `model.py` in the current directory is found before the package `model`; without this check
    the import fails much later with a message that does not name the cause.
    """
    root = Path(__file__).resolve().parent.parent
    for name in ("engine", "model", "tokenizer"):
        try:
            spec = find_spec(name)
        except ValueError:  # a module that was not imported from a file has this name
            spec = None
        locations = list(spec.submodule_search_locations or [spec.origin or ""]) if spec else []
        if root / name in [Path(location).resolve() for location in locations]:
            continue
        if not locations:
            raise ImportError(f"getp needs its package {name!r}, which is missing: reinstall getp")
        raise ImportError(
            f"{locations[0]} hides getp's package {name!r}: rename it, or run from a directory "
            f"that has no {name!r} of its own"
        )


_check_packages()

import model  # noqa: E402, F401  before torch: it sets how OpenMP threads wait

if TYPE_CHECKING:
    from engine import Completion, Engine, EngineConfig, Grammar, Request, SamplingParams
    from getp.library.llm import LLM, CompletionOutput, RequestOutput
    from tokenizer import Tokenizer

_MODULES = {
    "LLM": "getp.library.llm",
    "Completion": "engine",
    "CompletionOutput": "getp.library.llm",
    "Engine": "engine",
    "EngineConfig": "engine",
    "Grammar": "engine",
    "Request": "engine",
    "RequestOutput": "getp.library.llm",
    "SamplingParams": "engine",
    "Tokenizer": "tokenizer",
}

__all__ = [
    "LLM",
    "Completion",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "Grammar",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "Tokenizer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
