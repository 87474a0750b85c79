"""Checkpoints by their name on the Hugging Face Hub: from its local cache, or downloaded.

`huggingface_hub` comes with `tokenizers`. Its settings hold here: HF_HOME (where the cache is),
HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT.
"""

import errno
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from getp import __version__
from getp.errors import GetpError
from getp.terminal import print_message
from getp.units import memory

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

Part = Literal["config", "tokenizer", "weights"]
"""What is needed of a checkpoint. Each part includes those before it."""

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)/snapshots/[^/]+")
# Other programs may cache only some files of a model. Without these, the others are uncertain too.
_INDISPENSABLE: dict[Part, tuple[str, ...]] = {
    "config": ("config.json",),
    "tokenizer": ("config.json", "tokenizer.json"),
    "weights": ("config.json", "tokenizer.json"),
}
_MAKE_ROOM = "make room, or set HF_HOME to a folder on another disk"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SMALL_FILES = [
    "config.json", "generation_config.json", "hf_quant_config.json", _INDEX, "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
]  # fmt: skip


def _hub_name(text: str) -> "re.Match[str] | None":
    """Return the match of OWNER/NAME (group 1) or OWNER/NAME@REVISION (group 2)."""
    match = _NAME.fullmatch(text)
    if match is None:
        return None
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(match[1])
    except HFValidationError:
        return None
    return match


def model_name(folder: Path) -> str:
    """Return the name of a checkpoint: OWNER/NAME if it is in the hub's cache."""
    match = _SNAPSHOT.search(folder.resolve().as_posix())
    return folder.resolve().name if match is None else f"{match[1]}/{match[2]}"


def find_checkpoint(name: str, part: Part = "weights") -> Path:
    """Return the directory of a checkpoint: itself, or that of OWNER/NAME or OWNER/NAME@REVISION.

    A path that exists, or that is not of this form, is returned as it is. What is in the local
    cache is used without asking the hub; what is missing is downloaded, the weights only after the
    config was found to be supported. Raises GetpError, and CheckpointError for a config that cannot
    be used.
    """
    match = _hub_name(name)
    if match is None or Path(name).exists():
        return Path(name)
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # errors are raised, and worded here
    if not sys.stderr.isatty():
        disable_progress_bars()
    repository = _Repository(match[1], match[2])
    small = ["config.json"] if part == "config" else _SMALL_FILES
    folder = repository.cached(small)
    if folder is None or not all((folder / name).is_file() for name in _INDISPENSABLE[part]):
        folder = repository.download(small)
    if part != "weights":
        return folder
    from model.families import load_config

    load_config(folder)  # raises CheckpointError before gigabytes are downloaded
    weights = _weight_files(folder)
    if not all((folder / name).is_file() for name in weights):
        folder = repository.download([*small, *weights])
    return folder


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the files with weights: one file, or those in the index, as the loader.

    The index is small, so that it is here if the model has one. Raises GetpError if it is damaged.
    """
    if (folder / _WEIGHTS).is_file() or not (folder / _INDEX).is_file():
        return [_WEIGHTS]
    try:
        names: Any = json.loads((folder / _INDEX).read_bytes())["weight_map"].values()
        return sorted({name for name in names if Path(name).name == name})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise GetpError(f"{folder / _INDEX} is damaged ({error}): delete it") from error


class _Repository:
    """A model on the hub, at a revision (None: the main branch)."""

    def __init__(self, name: str, revision: str | None) -> None:
        from huggingface_hub import constants

        self.name, self.revision = name, revision
        self.endpoint: str = constants.ENDPOINT
        self.cache = Path(constants.HF_HUB_CACHE)

    def cached(self, files: list[str]) -> Path | None:
        """Return the directory in the local cache; None if it is known to lack one of the files."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return self._snapshot(files, local_files_only=True)
        except LocalEntryNotFoundError:
            return None

    def download(self, files: list[str]) -> Path:
        """Download those of the files that exist and are not cached; return the directory."""
        from huggingface_hub import HfApi

        with self._worded_errors():
            api = HfApi(library_name="getp", library_version=__version__)
            info = api.model_info(self.name, revision=self.revision, files_metadata=True)
            here = {file.rfilename for file in info.siblings or ()}
            if _WEIGHTS in files and _WEIGHTS not in here:
                raise GetpError(
                    f"{self.name} on {self.endpoint} has no weights in the format safetensors: "
                    "choose a model that has them"
                )
            size = self._missing_bytes(info, files)
            self._check_room(size)
            print_message(f"getp: downloading {self.name} ({memory(size)}) to {self.cache}")
            return self._snapshot(files)

    def _missing_bytes(self, info: "ModelInfo", files: list[str]) -> int:
        """Return the bytes of the given files that are not in the cache, not even in part."""
        blobs = self.cache / f"models--{self.name.replace('/', '--')}" / "blobs"
        size = 0
        for file in info.siblings or ():
            blob = file.lfs.sha256 if file.lfs is not None else file.blob_id
            if file.rfilename in files and not (blobs / str(blob)).exists():
                size += file.size or 0
        return max(0, size - sum(part.stat().st_size for part in blobs.glob("*.incomplete")))

    def _check_room(self, size: int) -> None:
        """Raise GetpError if the disk of the cache has not room for this many bytes."""
        existing = next(folder for folder in (self.cache, *self.cache.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if size > free:
            raise GetpError(
                f"{self.name} needs {memory(size)} in {self.cache}, which has "
                f"{memory(free)} left; {_MAKE_ROOM}"
            )

    def _snapshot(self, files: list[str], local_files_only: bool = False) -> Path:
        from huggingface_hub import snapshot_download

        folder: str = snapshot_download(
            self.name,
            revision=self.revision,
            allow_patterns=files,
            local_files_only=local_files_only,
            library_name="getp",
            library_version=__version__,
        )
        return Path(folder)

    @contextmanager
    def _worded_errors(self) -> Iterator[None]:
        """Turn errors of the download into GetpError with the remedy."""
        from huggingface_hub import errors

        page = f"{self.endpoint}/{self.name}"
        try:
            yield
        except GetpError:
            raise
        except errors.GatedRepoError as error:
            raise GetpError(
                f"{self.name} is only for accounts that accepted its terms: accept them on {page}, "
                "then log in with `hf auth login` or set HF_TOKEN"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise GetpError(
                f"{self.name} is neither a directory here nor a model on {self.endpoint}; for a "
                "private model log in with `hf auth login` or set HF_TOKEN"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise GetpError(
                f"{self.name} has no revision {self.revision!r}: {page} lists its branches, tags "
                "and commits"
            ) from error
        except errors.OfflineModeIsEnabled as error:
            raise GetpError(
                f"{self._not_cached()}, and HF_HUB_OFFLINE is set: unset it to download the model, "
                "or give a directory"
            ) from error
        except Exception as error:  # of an HTTP library that depends on huggingface_hub's version
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise GetpError(
                    f"the disk is full: {self.name} does not fit in {self.cache}; {_MAKE_ROOM}"
                ) from error
            reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
            raise GetpError(
                f"{self._not_cached()}, and cannot be downloaded from {self.endpoint}: {reason}. "
                "Repeat the command to continue the download, or give a directory"
            ) from error

    def _not_cached(self) -> str:
        return (
            f"{self.name} is neither a directory here nor complete in the local cache {self.cache}"
        )
