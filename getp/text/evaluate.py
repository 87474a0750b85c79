"""Modes decode and eval: convert a token file to text, or compare it with a reference."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from getp.errors import GetpError, UsageProblem
from getp.files import open_output, read_bytes, read_token_file, split_lines
from getp.units import counted
from tokenizer import Tokenizer, answer_text
from tokenizer.harmony import supports_harmony

_MAX_WRONG_SHOWN = 5


@dataclass(frozen=True)
class Difference:
    """The first difference between two token files. An id is None at the end of its line."""

    line: int  # line number, from 1
    position: int  # in the line, from 0
    token: int | None
    reference: int | None


@dataclass(frozen=True)
class Agreement:
    """The agreement of a token file with a reference."""

    lines: int
    lines_equal: int
    mean_prefix_tokens: float  # tokens until the first difference, mean over lines
    mean_prefix_share: float  # mean_prefix_tokens as a share of the longer line
    first_difference: Difference | None


@dataclass(frozen=True)
class WrongAnswer:
    """An answer that differs from the expected text."""

    line: int  # line number in the token file, from 1
    expected: str
    answer: str


@dataclass(frozen=True)
class Score:
    """The number of answers that are equal to the expected text."""

    lines: int
    right: int
    share_right: float
    first_wrong: tuple[WrongAnswer, ...]


def decode_file(path: str, output: str, tokenizer: Tokenizer, line: int | None) -> None:
    r"""Write the text of a token file: of one line unchanged, or of all lines, one text per line.

    In the second form, newlines inside a text are written as `\n`. Raises GetpError for an id that
    the tokenizer does not have, and UsageProblem for a line that does not exist.
    """
    rows = read_token_file(path)
    if line is not None and not 1 <= line <= len(rows):
        raise UsageProblem(
            "{line} must be from 1 to {lines} for {file}, not {given}",
            lines=len(rows),
            file=path,
            given=line,
        )
    first = 1 if line is None else line
    chosen = rows if line is None else [rows[line - 1]]
    unknown = {i for i in set(chain.from_iterable(chosen)) if not tokenizer.has_id(i)}
    for number, row in enumerate(chosen if unknown else [], start=first):
        if found := unknown.intersection(row):
            raise GetpError(
                "{file}, line {number}: the tokenizer has no token {token}; give the model that "
                "wrote the file as {checkpoint}, or its tokenizer with {tokenizer}",
                file=path,
                number=number,
                token=min(found),
            )
    texts = [_text(tokenizer, row) for row in chosen]
    with open_output(output) as file:
        for text in texts:
            shown = text if line is not None else one_line(text)
            file.write(shown.encode("utf-8", "replace") + b"\n")


def one_line(text: str) -> str:
    r"""Return `text` with `\n` and `\r` written out."""
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    # The markers separate the reasoning of gpt-oss from its answer.
    in_channels = supports_harmony(tokenizer) and tokenizer.token_id("<|message|>") in ids
    return tokenizer.decode(ids, skip_special=not in_channels)


def compare_tokens(rows: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> Agreement:
    """Compare two token files line by line. Raises GetpError if their lengths differ."""
    if len(rows) != len(reference):
        raise GetpError(
            f"the token file has {counted(len(rows), 'line')}, but the reference has "
            f"{len(reference)}: give two files of the same job"
        )
    equal, tokens, share = 0, 0, 0.0
    first: Difference | None = None
    for number, (row, other) in enumerate(zip(rows, reference, strict=True), start=1):
        longer = max(len(row), len(other))
        common = _common_prefix(row, other)
        tokens += common
        share += common / longer if longer else 1.0
        if common == longer:
            equal += 1
        elif first is None:
            first = Difference(number, common, _at(row, common), _at(other, common))
    lines = len(rows)
    return Agreement(lines, equal, tokens / max(lines, 1), share / lines if lines else 1.0, first)


def _common_prefix(row: Sequence[int], other: Sequence[int]) -> int:
    for position, (a, b) in enumerate(zip(row, other, strict=False)):
        if a != b:
            return position
    return min(len(row), len(other))


def _at(row: Sequence[int], position: int) -> int | None:
    return row[position] if position < len(row) else None


def score_texts(
    rows: Sequence[Sequence[int]], expected: Sequence[str], tokenizer: Tokenizer
) -> Score:
    """Compare the texts of the answers with the expected ones, without surrounding whitespace."""
    wrong = []
    for number, (row, expected_text) in enumerate(zip(rows, expected, strict=True), start=1):
        answer = one_line(answer_text(tokenizer, row).strip())
        if answer != expected_text.strip():
            wrong.append(WrongAnswer(number, expected_text.strip(), answer))
    right = len(rows) - len(wrong)
    return Score(len(rows), right, right / max(len(rows), 1), tuple(wrong[:_MAX_WRONG_SHOWN]))


def read_expected(path: str, count: int) -> list[str]:
    """Read `count` expected texts, one per line; the first line may be their number."""
    lines = [line.decode("utf-8", "replace") for line in split_lines(read_bytes(path))]
    if len(lines) == count + 1 and lines[0].strip() == str(count):
        lines = lines[1:]
    if len(lines) != count:
        raise GetpError(
            f"{path} has {counted(len(lines), 'line')}, but the token file has {count}: give "
            "one expected text per line"
        )
    return lines


def evaluate(
    path: str,
    reference: str | None,
    expected: str | None,
    tokenizer: Tokenizer | None,
    to_stderr: bool = False,
) -> dict[str, Any]:
    """Compare a token file with a reference, expected texts or both; print and return the result.

    tokenizer: needed for expected texts. to_stderr: print on standard error. Returns the report.
    """
    rows = read_token_file(path)
    table = Table(show_header=False)
    report: dict[str, Any] = {"input": path}
    if reference is not None:
        agreement = compare_tokens(rows, read_token_file(reference))
        report["reference"] = {"file": reference, **asdict(agreement)}
        _show_agreement(table, agreement)
    if expected is not None:
        assert tokenizer is not None
        score = score_texts(rows, read_expected(expected, len(rows)), tokenizer)
        report["expected"] = {"file": expected, **asdict(score)}
        _show_score(table, score)
    Console(stderr=to_stderr).print(table)
    return report


def _show_agreement(table: Table, agreement: Agreement) -> None:
    table.add_row("equal lines", f"{agreement.lines_equal:,} of {agreement.lines:,}")
    table.add_row(
        "mean common prefix",
        f"{agreement.mean_prefix_tokens:.2f} tokens, {agreement.mean_prefix_share:.2%}",
    )
    first = agreement.first_difference
    if first is not None:
        ids = [
            "end of line" if token is None else str(token)
            for token in (first.token, first.reference)
        ]
        table.add_row(
            "first difference",
            f"line {first.line}, token {first.position} (from 0): {ids[0]}, reference {ids[1]}",
        )


def _show_score(table: Table, score: Score) -> None:
    table.add_row("correct", f"{score.right:,} of {score.lines:,}, {score.share_right:.2%}")
    for wrong in score.first_wrong:
        # Text, not markup: an answer may contain square brackets.
        table.add_row(
            f"wrong, line {wrong.line}",
            Text(f"{wrong.answer!r}, expected {wrong.expected!r}"),
        )
