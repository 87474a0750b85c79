"""Tables as results: the columns of the input, then the answer of each row and how it ended."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO

from getp.errors import GetpError
from getp.files import json_line
from getp.job.formats.interface import Failure, JobRequest, OutputFormat, ResultContext, Rows
from getp.job.formats.table_files import DELIMITERS, KINDS, import_arrow
from getp.openai.tools import calls_of
from getp.text.answer_text import Answer
from getp.text.samples import Samples

if TYPE_CHECKING:
    import pyarrow as pa

ANSWER = "answer"
"""The column of the answers."""

_ID = "custom_id"  # a column only if the input is not a table, whose own columns identify the rows
_ROWS = 1024  # rows that are written together if the input is not a table


class TableResults(OutputFormat):
    """Tables of one kind. A failed request has an error in place of an answer."""

    holds_failures = True

    def __init__(self, kind: str) -> None:
        """kind: a key of KINDS."""
        self.name, self.suffix = kind, KINDS[kind]  # type: ignore[misc]

    def completed(self, context: ResultContext, request: JobRequest, samples: Samples) -> bytes:
        answer, *others = (context.answer(request, each) for each in samples.chosen)
        completion = samples.chosen[0]
        return json_line(
            {
                _ID: request.custom_id,
                ANSWER: answer.content,
                "other_answers": [each.content for each in others] or None,
                "reasoning": answer.reasoning or None,
                "tool_calls": _calls_text(answer, context.key(request.index)),
                "truncated": None if request.truncated == "none" else request.truncated,
                "finish_reason": completion.finish_reason,
                "prompt_tokens": completion.prompt_tokens,
                "completion_tokens": samples.completion_tokens,
                "error": None,
            }
        )

    def failed(self, context: ResultContext, failure: Failure) -> bytes:
        error = {"code": failure.code, "message": failure.message, "line": failure.line}
        return json_line({_ID: failure.custom_id, "error": error})

    def write(
        self, file: BinaryIO, results: Iterable[tuple[bool, bytes]], rows: "Rows | None"
    ) -> None:
        import_arrow()
        lines = (line for _, line in results)
        batches = _batches_alone(lines) if rows is None else _batches_beside(rows, lines)
        write_batches(file, self.name, batches)


def write_batches(file: BinaryIO, kind: str, batches: Iterator["pa.RecordBatch"]) -> None:
    """Write a table; kind: a key of KINDS. The batches may differ in the types of their columns.

    The first batch, which may be without rows, has the names and the types.
    """
    import pyarrow as pa
    from pyarrow import csv, ipc, parquet

    first = next(batches)
    if kind in DELIMITERS:
        first = _as_text(first)
    options = csv.WriteOptions(delimiter=DELIMITERS.get(kind, ","))
    open_writer: dict[str, Callable[[], Any]] = {
        "parquet": lambda: parquet.ParquetWriter(file, first.schema),
        "arrow": lambda: ipc.new_stream(file, first.schema),
        "csv": lambda: csv.CSVWriter(file, first.schema, write_options=options),
    }
    with open_writer.get(kind, open_writer["csv"])() as writer:
        writer.write_batch(first)
        for batch in batches:
            found = _as_text(batch) if kind in DELIMITERS else batch
            try:
                writer.write_batch(found.cast(first.schema))
            except (pa.ArrowInvalid, ValueError) as error:
                raise GetpError(
                    f"the files of the input have columns that do not fit together: {error}"
                ) from error


def _calls_text(answer: Answer, key: str) -> str | None:
    """Return the calls of tools as JSON, as responses have them."""
    if not answer.tool_calls:
        return None
    return json.dumps(calls_of(answer.tool_calls, key), ensure_ascii=False)


def _result_schema() -> "pa.Schema":
    import pyarrow as pa

    names = ("reasoning", "tool_calls", "truncated", "finish_reason")
    counts = ("prompt_tokens", "completion_tokens")
    return pa.schema(
        [(_ID, pa.string()), (ANSWER, pa.string()), ("other_answers", pa.list_(pa.string()))]
        + [(name, pa.string()) for name in names]
        + [(name, pa.int32()) for name in counts]
        + [("error", pa.string())]
    )


def _result_batch(lines: Sequence[bytes]) -> "pa.RecordBatch":
    import pyarrow as pa

    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["error"] = row["error"] and row["error"]["message"]
        for name, value in row.items():
            row[name] = _without_surrogates(value)
    return pa.RecordBatch.from_pylist(rows, _result_schema())


def _without_surrogates(value: Any) -> Any:
    """Return a text, or a list of texts, with U+FFFD for what has no UTF-8."""
    if isinstance(value, list):
        return [_without_surrogates(each) for each in value]
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _batches_alone(lines: Iterator[bytes]) -> Iterator["pa.RecordBatch"]:
    yield _result_batch([])
    while chunk := list(islice(lines, _ROWS)):
        yield _result_batch(chunk)


def _batches_beside(rows: Rows, lines: Iterator[bytes]) -> Iterator["pa.RecordBatch"]:
    """Yield the input's rows with the columns of their results."""
    import pyarrow as pa

    for batch in rows:
        results = _result_batch(list(islice(lines, batch.num_rows)))
        columns, names = list(batch.columns), list(batch.schema.names)
        for name in results.schema.names[1:]:
            columns.append(results.column(name))
            names.append(_free_name(name, names))
        yield pa.RecordBatch.from_arrays(columns, names)


def _free_name(name: str, taken: Sequence[str]) -> str:
    """Return the name of a result's column: a column of the input may already have it."""
    return name if name not in taken else _free_name(f"getp_{name}", taken)


def _as_text(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """Return a batch with JSON in place of lists and objects, which CSV does not have."""
    import pyarrow as pa

    def convert(column: "pa.Array") -> "pa.Array":
        if pa.types.is_dictionary(column.type):
            return column.dictionary_decode()
        if not pa.types.is_nested(column.type):
            return column
        cells = column.to_pylist()
        texts = [None if cell is None else json.dumps(cell, default=str) for cell in cells]
        return pa.array(texts, pa.string())

    columns = [convert(column) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


FORMATS = tuple(map(TableResults, KINDS))
