"""The formats of a job's input and output; see `interface`."""

from getp.files import STDIO
from getp.job.formats import jsonl, numbered_text, table, table_results
from getp.job.formats.interface import InputFormat, OutputFormat
from getp.job.formats.text_lines import TEXT_LINES
from getp.job.formats.token_lines import TOKEN_LINES

# The last one recognises any file.
FORMATS: tuple[InputFormat, ...] = (jsonl.FORMAT, *table.FORMATS, numbered_text.FORMAT)

OUTPUT_FORMATS: dict[str, OutputFormat] = {
    one.name: one for one in (TOKEN_LINES, TEXT_LINES, jsonl.BATCH_RESULTS, *table_results.FORMATS)
}


def input_format(path: str, start: bytes) -> InputFormat:
    """Return the format of a file: by its suffix or else by the bytes that it starts with."""
    return format_of_suffix(path) or next(one for one in FORMATS if one.recognises(start))


def output_format(path: str, source: InputFormat, name: str | None = None) -> OutputFormat:
    """Return the format of results: the named one; by default by the suffix of the path.

    On standard output (`-`) the default is the counterpart of the input's format.
    """
    if source.only_scores:
        return source.output
    if name is not None:
        return OUTPUT_FORMATS[name]
    if path == STDIO:
        return source.output
    plain = _uncompressed(path)
    found = (form for form in OUTPUT_FORMATS.values() if plain.endswith(form.suffix))
    return next(found, TOKEN_LINES)


def format_of_suffix(path: str) -> InputFormat | None:
    """Return the format of files with the suffix of this path; None if there is none."""
    plain = _uncompressed(path)
    return next((one for one in FORMATS if plain.endswith(one.suffix)), None)


def _uncompressed(path: str) -> str:
    return path.removesuffix(".gz").removesuffix(".zst")
