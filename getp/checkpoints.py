"""Finds the checkpoint that a user names, for the command line and for the library."""

from pathlib import Path
from typing import TYPE_CHECKING

from getp import hub
from getp.errors import GetpError, UsageProblem
from model.gguf import is_gguf, read_gguf

if TYPE_CHECKING:
    from tokenizer import Tokenizer

_GETP = Path(__file__).parent


def find_model(name: str, part: hub.Part = "weights") -> Path:
    """Return the directory of a model: the given one, or that of a name on the Hugging Face Hub.

    A GGUF file is returned as it is.

    part: what is needed of the model. Raises UsageProblem, GetpError and CheckpointError.
    """
    folder = hub.find_checkpoint(name, part)
    _check(folder)
    return folder


def embedded_model() -> Path:
    """Return the embedded model, from the package or from the source tree. Raises GetpError."""
    for folder in (_GETP / "data" / "model", _GETP.parent / "data" / "model"):
        if folder.is_dir():
            return folder
    raise GetpError("the embedded model is missing from this installation: name another checkpoint")


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Load the tokenizer of a directory, a tokenizer.json or a GGUF file. Raises TokenizerError.

    Raises CheckpointError for a GGUF file that is damaged.
    """
    from tokenizer import Tokenizer

    path = Path(path)
    if is_gguf(path):
        return Tokenizer.from_gguf(read_gguf(path).metadata, path)
    return Tokenizer.load(path)


def _check(folder: Path) -> None:
    """Raise UsageProblem if this is not a GGUF file or a directory with a model in it."""
    if is_gguf(folder):
        return
    if not folder.exists():
        hint = "Give a directory, or the name of a model on the Hugging Face Hub, OWNER/NAME"
        if any(letter.isspace() for letter in str(folder)):
            hint = "A prompt is given with {input}"
        raise UsageProblem(
            "the directory {folder} does not exist. " + hint, folder=repr(str(folder))
        )
    if not folder.is_dir():
        if not (folder.resolve().parent / "config.json").exists():
            raise UsageProblem(
                "{folder} is neither a model directory nor a GGUF file (an input file is given "
                "with {input})",
                folder=folder,
            )
        raise UsageProblem(
            "{folder} is not a GGUF file: give the directory, {parent} (an input file is given "
            "with {input})",
            folder=folder,
            parent=folder.resolve().parent,
        )
    if not any((folder / name).exists() for name in ("config.json", "tokenizer.json")):
        raise UsageProblem(
            f"{folder} is not a Hugging Face model directory (no config.json, no tokenizer.json)"
        )
