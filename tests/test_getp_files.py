import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from getp.errors import GetpError
from getp.files import (
    FailedRequest,
    check_writable,
    read_numbered_text,
    read_token_file,
    split_lines,
    write_errors,
    write_token_file,
)


def numbered(tmp_path: Path, data: bytes) -> str:
    file = tmp_path / "input.txt"
    file.write_bytes(data)
    return str(file)


lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")).map(
    lambda line: line.rstrip("\r")
)


@given(st.lists(lines), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_prompts_come_back_as_they_were_written(
    prompts: list[str], newline: str, bom: bool
) -> None:
    text = newline.join([str(len(prompts)), *prompts, ""])
    data = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    read = [line.decode() for line in split_lines(data)]
    assert read == [str(len(prompts)), *prompts]


def test_only_a_newline_separates_prompts(tmp_path: Path) -> None:
    odd = "one\u2028still one\x0b\x0c\x85\r!"
    prompts, ignored = read_numbered_text(numbered(tmp_path, f"2\r\n{odd}\r\ntwo".encode()))
    assert [prompt.text for prompt in prompts] == [odd, "two"]
    assert [prompt.line for prompt in prompts] == [2, 3]
    assert ignored == 0


def test_a_byte_order_mark_is_no_part_of_the_number(tmp_path: Path) -> None:
    prompts, _ = read_numbered_text(numbered(tmp_path, b"\xef\xbb\xbf1\n\xef\xbb\xbfa\n"))
    assert [prompt.text for prompt in prompts] == ["\ufeffa"]


def test_a_line_that_is_not_utf8_spoils_only_itself(tmp_path: Path) -> None:
    prompts, _ = read_numbered_text(numbered(tmp_path, b"3\na\n\xff\xfe\n\xc3\xa9\n"))
    assert [prompt.text for prompt in prompts] == ["a", None, "é"]


@pytest.mark.parametrize(
    ("data", "prompts", "ignored"),
    [
        (b"0\n", 0, 0),
        (b"1\na\nb\nc\n", 1, 2),
        (b"2\na\n\n", 2, 0),
        (b"1\na\n\n", 1, 1),
        (b" 1 \na", 1, 0),
    ],
)
def test_lines_after_the_last_prompt_are_ignored(
    tmp_path: Path, data: bytes, prompts: int, ignored: int
) -> None:
    found, rest = read_numbered_text(numbered(tmp_path, data))
    assert (len(found), rest) == (prompts, ignored)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "line 1: must be the number of prompts, not ''"),
        (b"hello\n", "line 1: must be the number of prompts, not 'hello'"),
        (b"-1\na\n", "line 1: must be"),
        (b"1.5\na\n", "line 1: must be"),
        ("١\na\n".encode(), "line 1: must be"),
        (b"9" * 5000, "line 1: must be"),
        (b"3\na\nb\n", "line 4: missing; line 1 promises 3 prompts, but only 2 follow"),
        (b"1\n", "line 2: missing"),
    ],
)
def test_a_wrong_file_is_refused_naming_the_line(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(GetpError, match=message):
        read_numbered_text(numbered(tmp_path, data))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(GetpError, match=r"cannot read .*nowhere.*No such file"):
        read_numbered_text(str(tmp_path / "nowhere"))
    with pytest.raises(GetpError, match="directory"):
        read_numbered_text(str(tmp_path))


def test_token_files_are_exact_to_the_last_space(tmp_path: Path) -> None:
    path = str(tmp_path / "out.txt")
    write_token_file(path, [[1, 22, 333], [], [7]])
    assert Path(path).read_bytes() == b"1 22 333\n\n7\n"
    assert [list(row) for row in read_token_file(path)] == [[1, 22, 333], [], [7]]


@pytest.mark.parametrize("word", ["x", "-1", "1.0", "99999999999", "2147483648", "²"])
def test_a_word_that_is_no_token_id_is_refused_naming_the_line(tmp_path: Path, word: str) -> None:
    with pytest.raises(GetpError, match=f"line 2: '{word}' is no token id"):
        read_token_file(numbered(tmp_path, f"1 2\n3 {word}\n".encode()))


def test_errors_are_one_json_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "out.errors.jsonl"
    write_errors(str(path), [FailedRequest(4, 2, "empty_prompt", "the prompt is «empty»")])
    assert path.read_text(encoding="utf-8") == (
        '{"line": 4, "index": 2, "code": "empty_prompt", "message": "the prompt is «empty»"}\n'
    )


def test_a_result_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")

    def rows() -> Iterator[list[int]]:
        yield [1, 2]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_token_file(str(target), rows())
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_results_are_written_through_links_and_into_pipes_and_devices(tmp_path: Path) -> None:
    target, link = tmp_path / "out.txt", tmp_path / "link"
    link.symlink_to(target)
    check_writable(str(link))
    write_token_file(str(link), [[1]])
    assert link.is_symlink()
    assert target.read_text() == "1\n"
    check_writable("/dev/null")
    write_token_file("/dev/null", [[1]])
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_what_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    source = numbered(tmp_path, b"0\n")
    (tmp_path / "link").symlink_to(source)
    for path in (source, str(tmp_path / "link")):
        with pytest.raises(GetpError, match="for something else, too"):
            check_writable(path, ["-", source])
    with pytest.raises(GetpError, match=r"cannot write .*No such file"):
        check_writable(str(tmp_path / "nowhere" / "out.txt"))
    with pytest.raises(GetpError, match="it is a directory"):
        check_writable(str(tmp_path))
    check_writable(str(tmp_path / "new.txt"), [source])
    assert not (tmp_path / "new.txt").exists()
