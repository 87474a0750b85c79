"""The result file of a job and its errors file, written from the journal or joined from shards."""

import glob
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from getp.errors import GetpError
from getp.files import STDIO, is_stream, open_input, open_output
from getp.job.formats import format_of_suffix
from getp.job.formats.interface import OutputFormat
from getp.job.formats.jsonl import FORMAT as JSONL
from getp.job.formats.table import TableFormat
from getp.job.formats.table_files import DELIMITERS, Table, empty_batch, read_header
from getp.job.formats.table_results import write_batches
from getp.job.inputs import Source
from getp.job.journal import Journal
from getp.job.request_reader import SeenIds
from getp.ownership import errors_path
from getp.terminal import discard_output, print_message, warn
from getp.units import counted

if TYPE_CHECKING:
    import pyarrow as pa

_COMPRESSION = (".gz", ".zst")
_RESULT_ID = re.compile(rb'\{"id":"[^"]*","custom_id":("(?:[^"\\]|\\.)*"),"response":\{')
_SHARD = re.compile(r"([0-9]+)-of-([0-9]+)")


def write_results(
    journal: Journal, source: Source, output: str, form: OutputFormat
) -> bytes | None:
    """Write the result of a finished job, in input order. Raises GetpError.

    Returns the line of the first failed request as the journal has it, or None.

    The errors file is written first, so that a result file always implies a complete job. If
    standard output or a pipe fails, the result is written to a file in the working directory,
    because such a job cannot be resumed.
    """
    if not form.holds_failures:
        _write_errors(journal, output, source.format.record_word)
    try:
        return _write(journal, source, output, form)
    except (GetpError, OSError) as error:
        if not is_stream(output):
            raise
        if output == STDIO:
            discard_output()
        names = (f"getp-results-{os.getpid()}-{n}{form.suffix}" for n in count(1))
        fallback = next(name for name in names if not os.path.lexists(name))
        _write(journal, source, fallback, form)
        cause = f"cannot write {output}: {error.strerror}" if isinstance(error, OSError) else error
        raise GetpError(f"{cause}; the results are in {fallback} instead") from error


def _write(journal: Journal, source: Source, output: str, form: OutputFormat) -> bytes | None:
    failures: list[bytes] = []  # the first one

    def results() -> Iterator[tuple[bool, bytes]]:
        for index in journal.indices:
            ok, line = journal.read(index)
            if not ok and not failures:
                failures.append(line)
            yield ok, line

    with open_output(output) as file:
        form.write(file, results(), source.rows())
    return failures[0] if failures else None


def _write_errors(journal: Journal, output: str, word: str) -> None:
    """Write or print the failures; word: what the input's records are called."""
    if not journal.failed:
        if not is_stream(output):
            Path(errors_path(output)).unlink(missing_ok=True)  # of an earlier run
        return
    failures = (line for ok, line in map(journal.read, journal.indices) if not ok)
    if is_stream(output):
        for line in failures:
            failure = json.loads(line)
            print_message(f"getp: {word} {failure['line']} failed: {failure['message']}")
        return
    with open_output(errors_path(output)) as file:
        for line in failures:
            file.write(line + b"\n")


def shard_path(output: str, shard: tuple[int, int]) -> str:
    """Return the path of a shard's results: `out.jsonl` → `out-03-of-12.jsonl`."""
    number, shards = shard
    stem, suffix = _split(output)
    return f"{stem}-{number:0{len(str(shards))}}-of-{shards}{suffix}"


def merge_shards(output: str) -> int:
    """Join the results of all shards of a job, in order; return their number.

    output: as it was given to the shards. Raises GetpError if a shard is missing or not finished.
    """
    paths = _finished_shards(output)
    form = format_of_suffix(output)
    with open_output(output) as file:
        if isinstance(form, TableFormat) and form.name not in DELIMITERS:
            write_batches(file, form.name, _table_batches(paths, form.name))
            return len(paths)
        delimiter = DELIMITERS[form.name] if isinstance(form, TableFormat) else None
        _join(paths, file, delimiter)
    if form is JSONL:
        _note_repeated_ids(output)
    failures = [name for name in map(errors_path, paths) if os.path.exists(name)]
    if failures:
        with open_output(errors_path(output)) as file:
            _join(failures, file)
    return len(paths)


def _note_repeated_ids(path: str) -> None:
    """Warn of ids that several shards have: each shard could check only its own."""
    with open_input(path) as file:
        seen = SeenIds(sum(1 for _ in file))
    with open_input(path) as file:
        found = (match[1] for match in map(_RESULT_ID.match, file) if match)
        repeated = [text for text in found if not seen.add(text.decode())]
    if repeated:
        warn(
            f"{path}: {counted(len(repeated), 'request')} in different shards have ids of others, "
            f"the first {repeated[0].decode()}; one job would have failed them"
        )


def _join(paths: Sequence[str], file: BinaryIO, delimiter: str | None = None) -> None:
    """Copy files one after the other; delimiter: of tables, which only the first gives a header."""
    for number, path in enumerate(paths):
        with open_input(path) as part:
            if delimiter is not None and number:
                read_header(part, delimiter)
            shutil.copyfileobj(part, file)


def _split(path: str) -> tuple[str, str]:
    """Split a path before its suffix, which may be followed by that of a compression."""
    plain, compression = next(
        ((path.removesuffix(each), each) for each in _COMPRESSION if path.endswith(each)),
        (path, ""),
    )
    stem, suffix = os.path.splitext(plain)
    return stem, suffix + compression


def _finished_shards(output: str) -> list[str]:
    """Return the paths of all shards' results. Raises GetpError unless each one is there."""
    stem, suffix = _split(output)
    found: set[int] = set()  # how many shards there are, by the names
    names = [*glob.glob(f"{glob.escape(stem)}-*-of-*{glob.escape(suffix)}")]
    names += glob.glob(f"{glob.escape(stem)}-*-of-*{glob.escape(suffix)}.journal")
    for name in names:
        middle = name.removesuffix(".journal")[len(stem) + 1 :].removesuffix(suffix)
        if match := _SHARD.fullmatch(middle):
            found.add(int(match[2]))
    if len(found) != 1:
        counts = " and ".join(f"of {count} shards" for count in sorted(found))
        problem = (
            f"has results of jobs {counts}: delete those of the other job"
            if found
            else (f"has no shards: there is no file {stem}-*-of-*{suffix}")
        )
        raise GetpError(f"{output} {problem}")
    (shards,) = found
    paths = [shard_path(output, (number, shards)) for number in range(1, shards + 1)]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise GetpError(
            "not all shards are finished: {missing} missing: run the job with {shard} for each of "
            "them, then merge again",
            missing=missing[0] + more,
        )
    unfinished = [path for path in paths if os.path.exists(f"{os.path.realpath(path)}.journal")]
    if unfinished:
        more = f" (and {len(unfinished) - 1} more)" if len(unfinished) > 1 else ""
        raise GetpError(
            f"not all shards are finished: {unfinished[0]}{more} has a journal beside it, of a "
            "newer run: repeat its command to finish that, or delete the journal"
        )
    return paths


def _table_batches(paths: Sequence[str], kind: str) -> Iterator["pa.RecordBatch"]:
    for path in paths:
        with open_input(path) as file:
            table = Table(file, kind)
            yield empty_batch(table.schema)
            yield from table.batches()
