"""Mode decode: the text of the answers in a result file."""

from collections.abc import Sequence
from itertools import chain

from getp.errors import GetpError, UsageProblem
from getp.files import open_output
from getp.text.escape import escape
from getp.text.result_file import TokenIds, read_results
from tokenizer import Tokenizer
from tokenizer.harmony import supports_harmony


def decode_file(path: str, output: str, tokenizer: Tokenizer, line: int | None) -> None:
    """Write the answers of a result file as text: one of them unchanged, or all, one per line.

    In the second form, newlines and backslashes in a text are escaped. Raises GetpError for an id
    that the tokenizer does not have, and UsageProblem for a line that does not exist.
    """
    results = read_results(path)
    if line is not None and not 1 <= line <= len(results):
        raise UsageProblem(
            "{line} must be from 1 to {lines} for {file}, not {given}",
            lines=len(results),
            file=path,
            given=line,
        )
    chosen = slice(None) if line is None else slice(line - 1, line)
    if results.ids is None:
        texts = results.texts[chosen]
    else:
        rows = results.ids[chosen]
        _check_ids(rows, path, line or 1, tokenizer)
        texts = [_text(tokenizer, row) for row in rows]
    with open_output(output) as file:
        for text in texts:
            shown = text if line is not None else escape(text)
            file.write(shown.encode("utf-8", "replace") + b"\n")


def _check_ids(rows: Sequence[TokenIds], path: str, first: int, tokenizer: Tokenizer) -> None:
    """Raise GetpError for an id that the tokenizer does not have; first: the first row's number."""
    unknown = {i for i in set(chain.from_iterable(rows)) if not tokenizer.has_id(i)}
    for number, row in enumerate(rows if unknown else [], start=first):
        if found := unknown.intersection(row):
            raise GetpError(
                "{file}, line {number}: the tokenizer has no token {token}; give the model that "
                "wrote the file as {checkpoint}, or its tokenizer with {tokenizer}",
                file=path,
                number=number,
                token=min(found),
            )


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    # The markers separate the reasoning of gpt-oss from its answer.
    in_channels = supports_harmony(tokenizer) and tokenizer.token_id("<|message|>") in ids
    return tokenizer.decode(ids, skip_special=not in_channels)
