"""Tables as input: one request per row, its prompt or messages and its parameters in columns."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from getp.errors import GetpError
from getp.files import MAX_LINE_BYTES
from getp.job.formats.interface import Line, ParsedBody
from getp.job.formats.jsonl import Jsonl, parse_flat
from getp.job.formats.table_files import KINDS, Table, empty_batch

if TYPE_CHECKING:
    import pyarrow as pa

_PROMPTS = ("prompt", "messages")  # the columns that hold the prompt if none is named
_ID = "custom_id"
_TEXTS = (_ID, "guided_regex", "guided_grammar", "reasoning_effort")  # are never JSON


@dataclass(frozen=True)
class Columns:
    """The columns of a table that make up a request."""

    prompt: str | None = None  # a text, token ids or messages; None: "prompt" or "messages"
    id: str | None = None  # None: requests have no ids of their own
    # Fields of a request and the column that holds each. A null or empty cell sets nothing.
    parameters: Mapping[str, str] = field(default_factory=dict)


class TableFormat(Jsonl):
    """Tables of one kind. A row becomes a line of JSONL, so it has the same fields and errors."""

    openai_defaults = None  # rows are not in OpenAI's format
    record_word = "row"
    may_be_shard = True

    def __init__(self, kind: str, columns: Columns | None = None) -> None:
        """kind: a key of KINDS; columns: None for the usual names."""
        self.name, self.suffix = kind, KINDS[kind]  # type: ignore[misc]
        self._columns = columns or Columns()

    def with_columns(self, columns: Columns) -> "TableFormat":
        return TableFormat(self.name, columns)

    def recognises(self, start: bytes) -> bool:
        return start.startswith({"parquet": b"PAR1", "arrow": b"ARROW1"}.get(self.name, b"\n"))

    def records(self, file: BinaryIO, name: str) -> Iterator[bytes | None]:
        table = Table(file, self.name)
        chosen = self._choose(table.schema, name)
        for batch in table.batches(list(dict.fromkeys(chosen.values()))):
            cells = [_values(batch.column(column)) for column in chosen.values()]
            for row in zip(*cells, strict=True):
                fields = zip(chosen, row, strict=True)
                yield _record({key: _value(key, cell) for key, cell in fields})

    def batches(self, file: BinaryIO, name: str) -> Iterator["pa.RecordBatch"]:
        table = Table(file, self.name)
        yield empty_batch(table.schema)  # so that a table without rows has its columns
        yield from table.batches()

    def announced_count(self, name: str, first: bytes | None) -> None:
        return None

    def is_request(self, number: int, data: bytes | None) -> bool:
        return True

    def parse(self, line: Line, record: dict[str, Any]) -> ParsedBody:
        return parse_flat(record)

    def _choose(self, schema: "pa.Schema", name: str) -> dict[str, str]:
        """Return the column of each field of a request. Raises GetpError if one does not exist."""
        columns = self._columns
        named = [columns.prompt, columns.id, *columns.parameters.values()]
        for column in (each for each in named if each is not None):
            if schema.names.count(column) != 1:
                problem = "has several columns" if column in schema.names else "has no column"
                raise GetpError(
                    f"{name} {problem} {column!r}; its columns: {_listed(schema.names)}"
                )
        prompt = columns.prompt or next((each for each in _PROMPTS if each in schema.names), None)
        if prompt is None:
            raise GetpError(
                "{file} has no column 'prompt' or 'messages'; name the one that holds the prompt "
                "with {column}. Its columns: {columns}",
                file=name,
                columns=_listed(schema.names),
            )
        fields = {_ID: columns.id} if columns.id is not None else {}
        key = _prompt_key(prompt, schema.field(prompt).type, name)
        return {**fields, **columns.parameters, key: prompt}


FORMATS = tuple(map(TableFormat, KINDS))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    return f"{shown}, …" if len(names) > 20 else shown


def _prompt_key(column: str, kind: "pa.DataType", name: str) -> str:
    """Return the field of a request that a column of this type holds."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return "prompt" if pa.types.is_integer(kind.value_type) else "messages"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "messages" if column == "messages" else "prompt"
    raise GetpError(
        f"{name}: column {column!r} has the type {kind}, but a prompt must be a text, a list of "
        "token ids or a list of messages"
    )


def _values(column: "pa.Array") -> list[Any]:
    """Return the cells of a column; invalid UTF-8 is kept, for the error of its request."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except UnicodeDecodeError:
        import pyarrow as pa

        cells = column.cast(pa.large_binary()).to_pylist()
        return [None if each is None else each.decode("utf-8", "surrogateescape") for each in cells]


def _value(key: str, cell: Any) -> Any:
    """Return the value of a field of a request; in a cell with text it is JSON or a text."""
    if not isinstance(cell, str) or key == "prompt":
        return cell
    if key in _TEXTS or not cell:
        return cell or None
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    is_text = key == "stop" and not isinstance(value, str | list)  # "stop" may be "4"
    return cell if is_text else value


def _record(row: Mapping[str, Any]) -> bytes | None:
    """Return a row as a line of JSONL, without its null cells; None if it is too long."""
    fields = {key: cell for key, cell in row.items() if cell is not None}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"), default=str)
    try:
        line = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # JSON in a cell had an escaped lone surrogate
        line = json.dumps(fields, separators=(",", ":"), default=str).encode()
    return line if len(line) < MAX_LINE_BYTES else None
