"""The files of an input: a single one, those that match a pattern, or the shards in a directory."""

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path

from getp.errors import GetpError
from getp.files import STDIO, remote_files
from getp.job.formats import InputFormat, format_of_suffix
from getp.ownership import is_remote
from getp.units import counted

_STATE = "state.json"  # of a data set that the package `datasets` saved to disk: its files
_SPLITS = "dataset_dict.json"  # the names of the data sets in the directories beside it


def input_files(path: str) -> list[str]:
    """Return the files of an input, in the order in which their requests are numbered.

    A directory may be a data set that the package `datasets` saved to disk; of any other, all files
    with the suffix of a format are read, sorted by name. Raises GetpError if there are none, or
    files of several formats.
    """
    if path == STDIO:
        return [path]
    if is_remote(path):
        found = remote_files(path)
        return found if found == [path] else _of_one_format(path, found)
    if os.path.isdir(path):
        return _saved_data_set(Path(path)) or _of_one_format(path, _files_below(path))
    if glob.has_magic(path) and not os.path.exists(path):
        matches = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
        if not matches:
            raise GetpError(f"cannot read {path}: no file matches this pattern")
        return sorted(matches)
    return [path]


def _files_below(folder: str) -> list[str]:
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(where, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _of_one_format(path: str, files: Sequence[str]) -> list[str]:
    """Return the files in the format of requests; raises GetpError unless they have only one."""
    by_format: dict[str, list[str]] = {}
    for name in files:
        form = format_of_suffix(name)
        if form is not None and form.may_be_shard:
            by_format.setdefault(form.name, []).append(name)
    if not by_format:
        raise GetpError(
            f"{path} has no files of requests: *.jsonl, *.parquet, *.arrow, *.csv or *.tsv"
        )
    if len(by_format) > 1:
        kinds = (counted(len(names), f"{form} file") for form, names in by_format.items())
        listed = " and ".join(kinds)
        raise GetpError(f"{path} has {listed}: choose one kind, such as '{path}/*.parquet'")
    return next(iter(by_format.values()))


def _saved_data_set(folder: Path) -> list[str]:
    """Return the files of a data set that `datasets` saved; an empty list for another directory."""
    if (folder / _SPLITS).is_file():
        splits = sorted(each.parent.name for each in folder.glob(f"*/{_STATE}"))
        raise GetpError(
            f"{folder} holds the data sets {', '.join(splits)}: give the directory of one of them, "
            f"such as {folder / (splits or ['train'])[0]}"
        )
    state = folder / _STATE
    if not state.is_file():
        return []
    try:
        names = [each["filename"] for each in json.loads(state.read_bytes())["_data_files"]]
        files = [str(folder / os.path.basename(name)) for name in names]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise GetpError(f"{state} does not list the files of a data set: {error}") from error
    return files


def format_of_files(files: Sequence[str], found: InputFormat) -> InputFormat:
    """Return the format of the first file. Raises GetpError if another file cannot follow it."""
    if len(files) > 1:
        if not found.may_be_shard:
            raise GetpError(f"{files[0]}: numbered text must be a single file, not {len(files)}")
        for name in files:
            if format_of_suffix(name) not in (found, None):
                raise GetpError(f"{files[0]} and {name} have different formats: choose one kind")
    return found
