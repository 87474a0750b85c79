"""Mode eval: compares a result file of mode getp with another one, or with expected texts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from getp.errors import GetpError
from getp.files import read_bytes, split_lines
from getp.text.escape import unescape
from getp.text.result_file import LoadTokenizer, Results, read_results
from getp.text.similarity import INSTALL, Similarity, similarity
from getp.units import counted

_MAX_WRONG_SHOWN = 5

Unit = Literal["token", "character"]


@dataclass(frozen=True)
class Difference:
    """The first difference between two result files."""

    line: int  # number of the answer, from 1
    position: int  # in the answer, from 0
    found: int | str | None  # a token id or a character; None: the answer ends here
    reference: int | str | None


@dataclass(frozen=True)
class Agreement:
    """The agreement of a result file with a reference."""

    unit: Unit  # what was compared
    lines: int  # answers
    lines_equal: int
    mean_prefix: float  # units until the first difference, mean over answers
    mean_prefix_share: float  # mean_prefix as a share of the longer answer
    first_difference: Difference | None


@dataclass(frozen=True)
class WrongAnswer:
    """An answer that differs from the expected text."""

    line: int  # number of the answer, from 1
    expected: str
    answer: str


@dataclass(frozen=True)
class Score:
    """The number of answers that are equal to the expected text."""

    lines: int
    right: int
    share_right: float
    first_wrong: tuple[WrongAnswer, ...]


def compare(results: Results, reference: Results, load_tokenizer: LoadTokenizer) -> Agreement:
    """Compare two result files answer by answer: their token ids, or texts if one has only texts.

    Raises GetpError if the numbers of answers differ.
    """
    if len(results) != len(reference):
        raise GetpError(
            f"{results.name} has {counted(len(results), 'answer')}, but {reference.name} has "
            f"{len(reference)}: give two results of the same job"
        )
    if results.ids is not None and reference.ids is not None:
        return _agreement(results.ids, reference.ids, "token")
    texts = results.as_texts(load_tokenizer), reference.as_texts(load_tokenizer)
    return _agreement(*texts, "character")


_Answer = Sequence[int] | Sequence[str]


def _agreement(answers: Sequence[_Answer], reference: Sequence[_Answer], unit: Unit) -> Agreement:
    equal, units, share = 0, 0, 0.0
    first: Difference | None = None
    for number, (row, other) in enumerate(zip(answers, reference, strict=True), start=1):
        longer = max(len(row), len(other))
        common = _common_prefix(row, other)
        units += common
        share += common / longer if longer else 1.0
        if common == longer:
            equal += 1
        elif first is None:
            first = Difference(number, common, _at(row, common), _at(other, common))
    lines = len(answers)
    mean_share = share / lines if lines else 1.0
    return Agreement(unit, lines, equal, units / max(lines, 1), mean_share, first)


def _common_prefix(row: _Answer, other: _Answer) -> int:
    for position, (a, b) in enumerate(zip(row, other, strict=False)):
        if a != b:
            return position
    return min(len(row), len(other))


def _at(row: _Answer, position: int) -> int | str | None:
    return row[position] if position < len(row) else None


def score_texts(answers: Sequence[str], expected: Sequence[str]) -> Score:
    """Compare the answers with the expected texts, without surrounding whitespace.

    An expected text may be escaped as mode decode writes it.
    """
    wrong = []
    for number, (answer, line) in enumerate(zip(answers, expected, strict=True), start=1):
        text = line.strip()
        if answer.strip() not in (text, unescape(text)):
            wrong.append(WrongAnswer(number, text, answer.strip()))
    right = len(answers) - len(wrong)
    return Score(len(answers), right, right / max(len(answers), 1), tuple(wrong[:_MAX_WRONG_SHOWN]))


def read_expected(path: str, count: int) -> list[str]:
    """Read `count` expected texts, one per line; the first line may be their number."""
    lines = [line.decode("utf-8", "replace") for line in split_lines(read_bytes(path))]
    if len(lines) == count + 1 and lines[0].strip() == str(count):
        lines = lines[1:]
    if len(lines) != count:
        raise GetpError(
            f"{path} has {counted(len(lines), 'line')}, but the result file has {count}: give "
            "one expected text per line"
        )
    return lines


def check_agreement(agreement: Mapping[str, Any] | None, required: float | None) -> None:
    """Raise GetpError if a smaller share of answers than required equals the reference."""
    if agreement is None or required is None:
        return
    equal, lines = agreement["lines_equal"], agreement["lines"]
    if equal < required * lines:
        raise GetpError(
            "{equal} of {lines} answers equal {file}, fewer than the share of {required:g} that "
            "{require_agreement} asks for".replace("{required:g}", f"{required:g}"),
            equal=equal,
            lines=lines,
            file=agreement["file"],
        )


def evaluate(
    path: str,
    reference: str | None,
    expected: str | None,
    load_tokenizer: LoadTokenizer,
    to_stderr: bool = False,
) -> dict[str, Any]:
    """Compare a result file with a reference, expected texts or both; print and return the result.

    load_tokenizer: called to compare token ids with texts. to_stderr: print on standard error.
    Returns the report.
    """
    results = read_results(path)
    table = Table(show_header=False)
    report: dict[str, Any] = {"input": path}
    if reference is not None:
        other = read_results(reference)
        agreement = compare(results, other, load_tokenizer)
        similar = similarity(results.as_texts(load_tokenizer), other.as_texts(load_tokenizer))
        report["reference"] = _entry(reference, agreement, similar)
        _show_agreement(table, agreement)
        _show_similarity(table, similar)
    if expected is not None:
        texts = results.as_texts(load_tokenizer)
        wanted = read_expected(expected, len(texts))
        score, similar = score_texts(texts, wanted), similarity(texts, list(map(unescape, wanted)))
        report["expected"] = _entry(expected, score, similar)
        _show_score(table, score)
        _show_similarity(table, similar)
    Console(stderr=to_stderr).print(table)
    return report


def _entry(file: str, found: Agreement | Score, similar: Similarity | None) -> dict[str, Any]:
    return {"file": file, **asdict(found), **(asdict(similar) if similar is not None else {})}


def _show_similarity(table: Table, similar: Similarity | None) -> None:
    if similar is None:
        # Text, not markup: the command contains square brackets.
        table.add_row("chrF, ROUGE-L", Text(f"not computed: {INSTALL}"))
    else:
        table.add_row("chrF, ROUGE-L", f"{similar.chrf:.4f}, {similar.rouge_l:.4f} (1: equal)")


def _show_agreement(table: Table, agreement: Agreement) -> None:
    table.add_row("equal answers", f"{agreement.lines_equal:,} of {agreement.lines:,}")
    table.add_row(
        "mean common prefix",
        f"{agreement.mean_prefix:.2f} {agreement.unit}s, {agreement.mean_prefix_share:.2%}",
    )
    first = agreement.first_difference
    if first is not None:
        found, reference = (
            "end of the answer" if each is None else repr(each)
            for each in (first.found, first.reference)
        )
        where = f"line {first.line}, {agreement.unit} {first.position} (from 0)"
        # Text, not markup: an answer may contain square brackets.
        table.add_row("first difference", Text(f"{where}: {found}, reference {reference}"))


def _show_score(table: Table, score: Score) -> None:
    table.add_row("correct", f"{score.right:,} of {score.lines:,}, {score.share_right:.2%}")
    for wrong in score.first_wrong:
        # Text, not markup: an answer may contain square brackets.
        table.add_row(
            f"wrong, line {wrong.line}",
            Text(f"{wrong.answer!r}, expected {wrong.expected!r}"),
        )
