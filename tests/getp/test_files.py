import io
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from getp.errors import GetpError
from getp.files import (
    check_writable,
    open_output,
    read_bytes,
    split_lines,
)
from getp.job.formats.interface import Line
from getp.job.inputs import scan
from getp.text.result_file import read_results
from tests.getp.helpers import write_tokens


def numbered(tmp_path: Path, data: bytes) -> str:
    file = tmp_path / "input.txt"
    file.write_bytes(data)
    return str(file)


lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")).map(
    lambda line: line.rstrip("\r")
)


@given(st.lists(lines), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_prompts_are_read_as_they_were_written(prompts: list[str], newline: str, bom: bool) -> None:
    text = newline.join([str(len(prompts)), *prompts, ""])
    data = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    read = [line.decode() for line in split_lines(data)]
    assert read == [str(len(prompts)), *prompts]


def read(path: str) -> list[Line]:
    return list(scan(path).lines())


def test_only_newlines_separate_prompts(tmp_path: Path) -> None:
    odd = "one\u2028still one\x0b\x0c\x85\r!"
    found = read(numbered(tmp_path, f"2\r\n{odd}\r\ntwo".encode()))
    assert found == [Line(0, 2, odd.encode()), Line(1, 3, b"two")]


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (line,) = read(numbered(tmp_path, b"\xef\xbb\xbf1\n\xef\xbb\xbfa\n"))
    assert line.data == "\ufeffa".encode()


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
    source = scan(numbered(tmp_path, data))
    assert (source.total, source.ignored) == (prompts, ignored)
    assert len(list(source.lines())) == prompts


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.jsonl", b"nonsense", "jsonl"),
        ("a.txt", b"0", "text"),
        ("a", b' {"prompt": "x"}', "jsonl"),
        ("a", b"0\n", "text"),
    ],
)
def test_format_is_recognised_by_suffix_or_first_character(
    tmp_path: Path, name: str, data: bytes, kind: str
) -> None:
    (tmp_path / name).write_bytes(data)
    assert scan(str(tmp_path / name)).format.name == kind


def test_blank_lines_of_jsonl_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n{1}\n \r\n{2}")
    assert read(str(tmp_path / "a.jsonl")) == [Line(0, 2, b"{1}"), Line(1, 4, b"{2}")]


def test_too_long_lines_are_skipped_without_reading_them_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getp.files.MAX_LINE_BYTES", 10)
    path = numbered(tmp_path, b"3\n" + b"x" * 95 + b"\n123456789\n1234567890")
    assert [line.data for line in read(path)] == [None, b"123456789", None]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_files_are_compressed_and_decompressed_by_suffix(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"a.jsonl{suffix}")
    for _ in range(2):
        with open_output(path) as file:
            file.write(b"one\ntwo\n" * 1000)
    first = Path(path).read_bytes()
    assert (len(first) < 1000) == bool(suffix)
    source = scan(path)
    assert (source.format.name, source.total) == ("jsonl", 2000)
    with open_output(path) as file:
        file.write(b"one\ntwo\n" * 1000)
    assert Path(path).read_bytes() == first
    if suffix:
        Path(path).write_bytes(first[:-3])
        with pytest.raises(GetpError, match=r"cannot read .*a.jsonl"):
            scan(path)


def test_input_that_becomes_shorter_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = numbered(tmp_path, b"3\na\nb\nc\n")
    source = scan(path)
    numbered(tmp_path, b"3\na\n")
    with pytest.raises(GetpError, match="was shortened while the job ran"):
        list(source.lines())


@pytest.mark.parametrize("changed", [b"3\na\nB\nc\n", b"3\na\nbb\nc\n", b"3\na\n\nc\n"])
def test_request_that_was_edited_after_the_first_pass_is_refused(
    tmp_path: Path, changed: bytes
) -> None:
    source = scan(numbered(tmp_path, b"3\na\nb\nc\nignored"))
    numbered(tmp_path, changed)
    found = source.lines()
    assert next(found) == Line(0, 2, b"a")
    with pytest.raises(
        GetpError, match=r"line 3: was changed while the job ran; restore the file .* with restart"
    ):
        next(found)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "line 1: must be the number of prompts, but it is empty"),
        (b"\n", "line 1: must be the number of prompts, but it is empty"),
        (b"hello\n", "line 1: must be the number of prompts, not 'hello'"),
        (b"-1\na\n", "line 1: must be"),
        (b"1.5\na\n", "line 1: must be"),
        ("١\na\n".encode(), "line 1: must be"),
        (b"9" * 5000, "line 1: must be"),
        (b"3\na\nb\n", "line 1 says 3 prompts, but the file has only 2"),
        (b"1\n", "line 1 says 1 prompts, but the file has only 0"),
    ],
)
def test_wrong_input_file_is_refused_with_the_line_number(
    tmp_path: Path, data: bytes, message: str
) -> None:
    with pytest.raises(GetpError, match=message):
        scan(numbered(tmp_path, data))


@pytest.mark.parametrize("data", [b'[{"prompt": "a"}]', b'\xef\xbb\xbf[\n{"prompt": "a"},\n]'])
def test_json_array_is_refused_with_the_remedy(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(data)
    with pytest.raises(
        GetpError, match=r"input.jsonl is a JSON array; write each request on a line"
    ):
        scan(str(path))


def test_error_names_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(GetpError, match=r"cannot read .*nowhere.*No such file"):
        scan(str(tmp_path / "nowhere"))
    with pytest.raises(GetpError, match="has no files of requests"):
        scan(str(tmp_path))


def test_token_files_are_written_byte_for_byte(tmp_path: Path) -> None:
    path = str(tmp_path / "out.txt")
    write_tokens(path, [[1, 22, 333], [], [7]])
    assert Path(path).read_bytes() == b"1 22 333\n\n7\n"
    ids = read_results(path).ids
    assert ids is not None
    assert [list(row) for row in ids] == [[1, 22, 333], [], [7]]


@pytest.mark.parametrize("word", ["x", "-1", "1.0", "99999999999", "2147483648", "²"])
def test_word_that_is_not_a_token_id_is_refused_with_the_line_number(
    tmp_path: Path, word: str
) -> None:
    with pytest.raises(GetpError, match=f"line 2: '{word}' is not a token id; give a result of"):
        read_results(numbered(tmp_path, f"1 2\n3 {word}\n".encode()))


def test_result_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")

    def rows() -> Iterator[list[int]]:
        yield [1, 2]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_tokens(str(target), rows())
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_results_are_written_through_symbolic_links_and_to_devices(tmp_path: Path) -> None:
    target, link = tmp_path / "out.txt", tmp_path / "link"
    link.symlink_to(target)
    check_writable(str(link), "output")
    write_tokens(str(link), [[1]])
    assert link.is_symlink()
    assert target.read_text() == "1\n"
    check_writable("/dev/null", "output")
    write_tokens("/dev/null", [[1]])
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_unwritable_output_is_reported_before_the_work(tmp_path: Path) -> None:
    source = numbered(tmp_path, b"0\n")
    (tmp_path / "link").symlink_to(source)
    for path in (source, str(tmp_path / "link")):
        with pytest.raises(GetpError, match=f"output and input are the same file: {path}"):
            check_writable(path, "output", {"journal": "-", "input": source})
    with pytest.raises(GetpError, match=r"cannot write .*the directory .* does not exist"):
        check_writable(str(tmp_path / "nowhere" / "out.txt"), "output")
    with pytest.raises(GetpError, match="it is a directory"):
        check_writable(str(tmp_path), "output")
    check_writable(str(tmp_path / "new.txt"), "output", {"input": source})
    assert not (tmp_path / "new.txt").exists()


@pytest.mark.parametrize(
    ("terminal", "shown"), [(True, "a[31mb\u4f60\n"), (False, "a\x1b[31mb\u4f60\n")]
)
def test_control_characters_of_a_text_do_not_reach_a_terminal(
    terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Buffer(io.BytesIO):
        def isatty(self) -> bool:
            return terminal

    out = Buffer()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))
    with open_output("-") as file:
        file.write("a\x1b[31mb\u4f60\n".encode())
    assert out.getvalue().decode() == shown


def test_uncompressed_files_need_no_compression_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)  # as if it were not installed
    (tmp_path / "in.txt").write_bytes(b"1\na prompt\n")
    assert read_bytes(str(tmp_path / "in.txt")) == b"1\na prompt\n"
