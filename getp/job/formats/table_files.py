"""Files with a table, read in bounded memory: Parquet, Arrow, CSV and TSV, by pyarrow."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from getp.errors import GetpError
from getp.files import UTF8_BOM

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = {"parquet": ".parquet", "arrow": ".arrow", "csv": ".csv", "tsv": ".tsv"}
"""The kinds of tables and the suffixes of their files."""

DELIMITERS = {"csv": ",", "tsv": "\t"}

_ROWS = 256  # rows of a Parquet file that are decoded together
_CSV_BLOCK = 16 << 20  # bytes; a longer row of a CSV file is an error
_ARROW_MAGIC = b"ARROW1"  # of the format with an index, unlike Arrow's streaming format


class Table:
    """An open table: its schema, and its rows in batches."""

    def __init__(self, file: BinaryIO, kind: str) -> None:
        """kind: a key of KINDS. Raises GetpError without pyarrow, OSError for an invalid file."""
        import_arrow()
        self._file = file
        with _as_os_errors():
            open_kind = {"parquet": self._open_parquet, "arrow": self._open_arrow}
            open_kind.get(kind, self._open_csv)(DELIMITERS.get(kind, ""))

    def batches(self, columns: Sequence[str] | None = None) -> Iterator["pa.RecordBatch"]:
        """Yield the rows; columns: those needed (None: all). Raises OSError."""
        with _as_os_errors():
            for batch in self._batches(None if columns is None else list(columns)):
                yield batch if columns is None else batch.select(columns)

    def _open_parquet(self, _: str) -> None:
        from pyarrow import parquet

        # Without buffering in advance, memory does not grow with the size of a row group.
        file = parquet.ParquetFile(self._file, buffer_size=1 << 20, pre_buffer=False)
        self.schema = file.schema_arrow
        self._batches = lambda columns: file.iter_batches(_ROWS, columns=columns, use_threads=False)

    def _open_arrow(self, _: str) -> None:
        from pyarrow import ipc

        start = self._file.read(len(_ARROW_MAGIC))
        self._file.seek(0)
        if start == _ARROW_MAGIC:
            file = ipc.open_file(self._file)
            self._batches = lambda _: map(file.get_batch, range(file.num_record_batches))
        else:
            file = ipc.open_stream(self._file)
            self._batches = lambda _: iter(file)
        self.schema = file.schema

    def _open_csv(self, delimiter: str) -> None:
        import pyarrow as pa

        names = read_header(self._file, delimiter)
        if not names:
            raise OSError("the file is empty: its first line must name the columns")
        # Every cell stays text: types that are guessed from the first rows may not fit later ones.
        self.schema = pa.schema([(name, pa.string()) for name in names])
        self._batches = lambda columns: self._csv_batches(names, delimiter, columns)

    def _csv_batches(
        self, names: list[str], delimiter: str, columns: list[str] | None
    ) -> Iterator["pa.RecordBatch"]:
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        convert = arrow_csv.ConvertOptions(
            check_utf8=False,
            column_types={name: pa.string() for name in names},
            strings_can_be_null=False,
            include_columns=columns,
        )
        read = arrow_csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK, column_names=names)
        parse = arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        try:
            reader = arrow_csv.open_csv(self._file, read, parse, convert)
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):
                return
            raise
        yield from reader


def read_header(file: BinaryIO, delimiter: str) -> list[str]:
    """Read the first row of a CSV or TSV file; nothing after it is read."""
    return next(csv.reader(_text_lines(file), delimiter=delimiter), [])


def empty_batch(schema: "pa.Schema") -> "pa.RecordBatch":
    """Return a batch without rows."""
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([pa.array([], each.type) for each in schema], schema=schema)


def import_arrow() -> None:
    """Raise GetpError if pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise GetpError(
            "tables (Parquet, Arrow, CSV, TSV) need pyarrow: pip install 'getp[tables]'"
        ) from None


def _text_lines(file: BinaryIO) -> Iterator[str]:
    """Yield lines as text, and read none before it is asked for."""
    first = True
    while line := file.readline(_CSV_BLOCK):
        yield (line.removeprefix(UTF8_BOM) if first else line).decode("utf-8", "replace")
        first = False


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turn pyarrow's errors into OSError; the opener of the file reports it with its name."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, csv.Error, ValueError, KeyError, NotImplementedError) as error:
        message = str(error.args[0] if error.args else error).split("\n")[0]
        raise OSError(message) from error
