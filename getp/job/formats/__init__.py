"""The formats of a job's input and output: one module each, listed in `_MODULES`.

The module of an input format defines `FORMAT`, an `InputFormat`; see `interface`.
"""

from importlib import import_module

from getp.files import STDIO
from getp.job.formats.interface import InputFormat, OutputFormat
from getp.job.formats.jsonl import BATCH_RESULTS
from getp.job.formats.text_lines import TEXT_LINES
from getp.job.formats.token_lines import TOKEN_LINES

_MODULES = ("jsonl", "numbered_text")  # the last one recognises any file

FORMATS: tuple[InputFormat, ...] = tuple(
    import_module(f"{__name__}.{module}").FORMAT for module in _MODULES
)


OUTPUT_FORMATS: dict[str, OutputFormat] = {
    one.name: one for one in (TOKEN_LINES, TEXT_LINES, BATCH_RESULTS)
}


def input_format(path: str, start: bytes) -> InputFormat:
    """Return the format of a file: by its suffix or else by the bytes that it starts with."""
    return _by_suffix(path) or next(one for one in FORMATS if one.recognises(start))


def output_format(path: str, source: InputFormat, name: str | None = None) -> OutputFormat:
    """Return the format of results: the named one; by default by the suffix of the path.

    On standard output (`-`) the default is the counterpart of the input's format.
    """
    if name is not None:
        return OUTPUT_FORMATS[name]
    if path == STDIO:
        return source.output
    found = _by_suffix(path)
    return TOKEN_LINES if found is None else found.output


def _by_suffix(path: str) -> InputFormat | None:
    plain = path.removesuffix(".gz").removesuffix(".zst")
    return next((one for one in FORMATS if plain.endswith(one.suffix)), None)
