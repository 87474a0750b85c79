import json
from pathlib import Path

import pytest

from getp.cli import main as cli
from getp.errors import GetpError, UsageProblem
from getp.text.evaluate import compare_tokens, decode_file, evaluate
from tests.getp.helpers import small_tokenizer, write_tokens

TOKENIZER = small_tokenizer()
HARMONY = "<|channel|>final<|message|>42<|return|>"


def tokens(path: Path, *texts: str) -> str:
    write_tokens(str(path), [TOKENIZER.encode(text) for text in texts])
    return str(path)


def test_every_line_is_decoded_to_one_line(tmp_path: Path) -> None:
    source = tokens(tmp_path / "in", "naïve 🙂<eos>", "", "two\nlines", HARMONY)
    decode_file(source, str(tmp_path / "out"), TOKENIZER, None)
    assert (tmp_path / "out").read_text(encoding="utf-8") == (
        f"naïve 🙂\n\ntwo\\nlines\n{HARMONY}\n"
    )


def test_single_line_is_decoded_unescaped(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    source = tokens(tmp_path / "in", "one", "two\nlines")
    decode_file(source, "-", TOKENIZER, 2)
    assert capfdbinary.readouterr().out == b"two\nlines\n"
    with pytest.raises(UsageProblem, match=r"line must be from 1 to 2 .*, not 3"):
        decode_file(source, "-", TOKENIZER, 3)


def test_error_names_an_unknown_token_id_and_its_line(tmp_path: Path) -> None:
    write_tokens(str(tmp_path / "in"), [[1, 2], [3, 99_999, 2**31 - 1]])
    for line in (None, 2):
        with pytest.raises(
            GetpError, match=r"line 2: the tokenizer has no token 99999; .* with tokenizer"
        ):
            decode_file(str(tmp_path / "in"), str(tmp_path / "out"), TOKENIZER, line)
    decode_file(str(tmp_path / "in"), str(tmp_path / "out"), TOKENIZER, 1)


def test_token_files_are_compared_line_by_line() -> None:
    agreement = compare_tokens(
        [[1, 2, 3, 4], [5], [], [1, 2, 9], [7]], [[1, 2, 3, 4], [5, 6], [], [1, 2, 3], [8]]
    )
    assert (agreement.lines, agreement.lines_equal) == (5, 2)
    assert agreement.mean_prefix_tokens == pytest.approx((4 + 1 + 0 + 2 + 0) / 5)
    assert agreement.mean_prefix_share == pytest.approx((1 + 0.5 + 1 + 2 / 3 + 0) / 5)
    first = agreement.first_difference
    assert first is not None
    assert (first.line, first.position, first.token, first.reference) == (2, 1, None, 6)


def test_equal_token_files_have_no_difference() -> None:
    agreement = compare_tokens([[1], []], [[1], []])
    assert agreement.lines_equal == 2
    assert agreement.mean_prefix_share == 1.0
    assert agreement.first_difference is None


def test_token_files_of_different_lengths_are_refused() -> None:
    with pytest.raises(GetpError, match="has 1 line, but the reference has 2"):
        compare_tokens([[1]], [[1], [2]])


@pytest.mark.parametrize("numbered", [False, True])
def test_answers_are_scored_by_their_final_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], numbered: bool
) -> None:
    source = tokens(tmp_path / "in", " 7<eos>", HARMONY, "[b]wrong[/b]", "")
    lines = ["7", "42 ", "right", "missing"]
    expected = tmp_path / "expected"
    expected.write_text("\n".join(["4", *lines] if numbered else lines) + "\n")
    report = evaluate(source, None, str(expected), TOKENIZER)
    assert report["expected"]["share_right"] == 0.5
    assert [wrong["line"] for wrong in report["expected"]["first_wrong"]] == [3, 4]
    assert "[b]wrong[/b]" in capsys.readouterr().out
    json.dumps(report)


def test_report_on_standard_output_is_only_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tokens(tmp_path / "in", "7")
    assert cli.run(["-m", "eval", "-i", source, "--reference", source, "--report", "-"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["reference"]["lines_equal"] == 1
    assert "1 of 1" in captured.err


def test_number_of_expected_texts_must_equal_that_of_the_answers(tmp_path: Path) -> None:
    source = tokens(tmp_path / "in", "7")
    (tmp_path / "expected").write_text("7\n8\n")
    with pytest.raises(GetpError, match="has 2 lines, but the token file has 1"):
        evaluate(source, None, str(tmp_path / "expected"), TOKENIZER)
