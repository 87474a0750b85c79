import json
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from getp.cli import main as cli
from getp.errors import GetpError, UsageProblem
from getp.text.decode import decode_file
from getp.text.escape import escape, unescape
from getp.text.evaluate import Agreement, compare, evaluate
from getp.text.result_file import Results
from tests.getp.helpers import small_tokenizer, write_tokens

TOKENIZER = small_tokenizer()
HARMONY = "<|channel|>final<|message|>42<|return|>"


def tokens(path: Path, *texts: str) -> str:
    write_tokens(str(path), [TOKENIZER.encode(text) for text in texts])
    return str(path)


def test_every_line_is_decoded_to_one_line(tmp_path: Path) -> None:
    source = tokens(tmp_path / "in", "naïve 🙂<eos>", "", "two\nlines", r"a\n", HARMONY)
    decode_file(source, str(tmp_path / "out"), TOKENIZER, None)
    assert (tmp_path / "out").read_text(encoding="utf-8") == (
        f"naïve 🙂\n\ntwo\\nlines\na\\\\n\n{HARMONY}\n"
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


def of_ids(*rows: list[int]) -> Results:
    return Results("ids", ids=[array("i", row) for row in rows])


def compared(results: Results, reference: Results) -> Agreement:
    return compare(results, reference, lambda: TOKENIZER)


def test_token_ids_are_compared_line_by_line() -> None:
    agreement = compared(
        of_ids([1, 2, 3, 4], [5], [], [1, 2, 9], [7]),
        of_ids([1, 2, 3, 4], [5, 6], [], [1, 2, 3], [8]),
    )
    assert (agreement.unit, agreement.lines, agreement.lines_equal) == ("token", 5, 2)
    assert agreement.mean_prefix == pytest.approx((4 + 1 + 0 + 2 + 0) / 5)
    assert agreement.mean_prefix_share == pytest.approx((1 + 0.5 + 1 + 2 / 3 + 0) / 5)
    first = agreement.first_difference
    assert first is not None
    assert (first.line, first.position, first.found, first.reference) == (2, 1, None, 6)


def test_equal_token_files_have_no_difference() -> None:
    agreement = compared(of_ids([1], []), of_ids([1], []))
    assert agreement.lines_equal == 2
    assert agreement.mean_prefix_share == 1.0
    assert agreement.first_difference is None


def test_results_of_different_lengths_are_refused() -> None:
    with pytest.raises(GetpError, match="ids has 1 answer, but ids has 2: give two results of"):
        compared(of_ids([1]), of_ids([1], [2]))


@pytest.mark.parametrize("numbered", [False, True])
def test_answers_are_scored_by_their_final_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], numbered: bool
) -> None:
    source = tokens(tmp_path / "in", " 7<eos>", HARMONY, "[b]wrong[/b]", "")
    lines = ["7", "42 ", "right", "missing"]
    expected = tmp_path / "expected"
    expected.write_text("\n".join(["4", *lines] if numbered else lines) + "\n")
    report = evaluate(source, None, str(expected), lambda: TOKENIZER)
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
    with pytest.raises(GetpError, match="has 2 lines, but the result file has 1"):
        evaluate(source, None, str(tmp_path / "expected"), lambda: TOKENIZER)


@given(st.text())
def test_escaped_text_is_one_line_and_is_restored(text: str) -> None:
    assert "\n" not in escape(text)
    assert "\r" not in escape(text)
    assert unescape(escape(text)) == text


def test_expected_texts_may_be_escaped_or_not(tmp_path: Path) -> None:
    source = tokens(tmp_path / "in", "two\nlines", r"\frac{1}{2}", r"\frac{1}{2}", r"C:\new")
    expected = tmp_path / "expected"
    expected.write_text("two\\nlines\n\\frac{1}{2}\n\\\\frac{1}{2}\nC:\\new\n")
    report = evaluate(source, None, str(expected), lambda: TOKENIZER)
    assert report["expected"]["right"] == 4


def line(custom_id: str, content: str | None, chat: bool = True) -> str:
    choice = {"message": {"content": content}} if chat else {"text": content}
    response = {"status_code": 200, "body": {"choices": [choice]}}
    return json.dumps({"custom_id": custom_id, "response": response, "error": None}) + "\n"


FAILED = json.dumps({"response": None, "error": {"code": "x", "message": "the prompt is empty"}})


def jsonl(path: Path) -> str:
    lines = [line("a", "7"), line("b", "two\nlines", chat=False), FAILED + "\n", line("d", None)]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def test_answers_of_a_jsonl_result_are_decoded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "out.jsonl")
    decode_file(source, "-", TOKENIZER, None)
    assert capfd.readouterr() == (
        "7\ntwo\\nlines\n\n\n",
        f"getp: warning: {source}: 1 request of 4 failed, so the answer is empty; the first is "
        "line 3: the prompt is empty\n",
    )
    decode_file(source, "-", TOKENIZER, 2)
    assert capfd.readouterr().out == "two\nlines\n"
    with pytest.raises(UsageProblem, match=r"line must be from 1 to 4 .*, not 5"):
        decode_file(source, "-", TOKENIZER, 5)


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "hi"}',
        '{"custom_id": "a", "body": {"messages": []}}',
        '{"error": null, "response": {"body": {"choices": []}}}',
        '{"error": null, "response": {"body": {"choices": [{"text": 7}]}}}',
        '{"error": "x", "response": null}',
        "{",
        "[" * 100_000,
    ],
)
def test_jsonl_that_is_not_a_result_is_refused_with_the_line_number(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "in.jsonl").write_text(line("a", "7") + content + "\n")
    with pytest.raises(GetpError, match=r"in\.jsonl, line 2: is not a line of a JSONL result"):
        decode_file(str(tmp_path / "in.jsonl"), "-", TOKENIZER, None)


def test_jsonl_results_are_scored_and_compared_as_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "out.jsonl")
    ids = tokens(tmp_path / "ids", "7<eos>", "two\nlinks<eos>", "", "")
    (tmp_path / "expected").write_text("7\ntwo\\nlines\nmissing\n\n")
    report = evaluate(source, ids, str(tmp_path / "expected"), lambda: TOKENIZER)
    assert report["expected"]["right"] == 3
    agreement = report["reference"]
    assert (agreement["unit"], agreement["lines_equal"]) == ("character", 3)
    assert agreement["first_difference"] == {
        "line": 2,
        "position": 7,
        "found": "e",
        "reference": "k",
    }
    assert "line 2, character 7 (from 0): 'e', reference 'k'" in capsys.readouterr().out
    report = evaluate(source, source, None, lambda: pytest.fail("texts need no tokenizer"))
    assert report["reference"]["lines_equal"] == 4


def test_similar_texts_are_measured(tmp_path: Path) -> None:
    expected = tmp_path / "expected"
    expected.write_text("the cat sat on the mat\n12 apples\n")
    source = tokens(tmp_path / "ids", "the cat sat on a mat<eos>", "12 apples<eos>")
    report = evaluate(source, source, str(expected), lambda: TOKENIZER)
    found, same = report["expected"], report["reference"]
    assert (same["chrf"], same["rouge_l"]) == (1.0, 1.0)
    # Five of the six words of each text are common, in order.
    assert found["rouge_l"] == pytest.approx((5 / 6 + 1) / 2)
    assert 0.7 < found["chrf"] < 1


def test_the_package_that_similarity_needs_is_named_with_its_brackets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getp.text.evaluate.similarity", lambda *texts: None)
    source = tokens(tmp_path / "a", "one")
    evaluate(source, source, None, lambda: TOKENIZER)
    assert "not computed: pip install 'getp[eval]'" in capsys.readouterr().out


def test_a_low_agreement_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tokens(tmp_path / "a", "one", "two", "six", "ten")
    other = tokens(tmp_path / "b", "one", "two", "six", "TEN")
    command = ["-m", "eval", "-i", source, "--reference", other, "--require-agreement"]
    assert cli.run([*command, "0.75"]) == 0
    assert cli.run([*command, "0.76"]) == 1
    assert "3 of 4 answers equal" in capsys.readouterr().err
    assert cli.run(["-m", "eval", "-i", source, "--expected", "x", "--require-agreement", "1"]) == 2
