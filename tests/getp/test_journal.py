import errno
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from getp.errors import GetpError
from getp.job.journal import Journal

HEADER = {"fingerprint": {"temperature": 0.0, "input": "abc"}, "seed": 1}


def journal(tmp_path: Path, header: dict[str, Any] = HEADER, **options: Any) -> Journal:
    return Journal(str(tmp_path / "j"), header, range(10), **{"flush_s": 0.01, **options})


def write_records(tmp_path: Path) -> list[bytes]:
    """Write a journal with three records; return its lines."""
    with journal(tmp_path) as new:
        new.append(4, True, b"1 2 3")
        new.append(0, False, b'{"code": "x"}')
        new.append(2, True, b"")
    return (tmp_path / "j").read_bytes().splitlines(keepends=True)


def test_appended_records_are_found_again(tmp_path: Path) -> None:
    write_records(tmp_path)
    with journal(tmp_path, {**HEADER, "seed": 2}) as found:
        assert [index for index in range(10) if index in found] == [0, 2, 4]
        assert (found.done, found.failed, found.damaged) == (3, 1, 0)
        assert found.read(4) == (True, b"1 2 3")
        assert found.read(0) == (False, b'{"code": "x"}')
        assert found.header["seed"] == 1  # of the existing journal
        found.append(7, True, b"more")
        assert found.read(7) == (True, b"more")


def test_complete_records_before_any_truncation_are_found(tmp_path: Path) -> None:
    lines = write_records(tmp_path)
    data = b"".join(lines)
    for length in range(len(data)):
        (tmp_path / "j").write_bytes(data[:length])
        with journal(tmp_path, flush_s=0) as found:
            assert found.done == max(data[:length].count(b"\n") - 1, 0)
            assert found.damaged == 0
            found.append(9, True, b"after")
        with journal(tmp_path) as again:
            assert again.read(9) == (True, b"after")


def test_flipped_bit_loses_only_the_records_that_it_touches(tmp_path: Path) -> None:
    lines = write_records(tmp_path)
    data, first = b"".join(lines), len(lines[0])
    for at in range(first, len(data)):
        (tmp_path / "j").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with journal(tmp_path) as found:
            lost = 2 if data[at : at + 1] == b"\n" and at < len(data) - 1 else 1
            assert found.done == 3 - lost
            for index, line in ((4, b"1 2 3"), (0, b'{"code": "x"}'), (2, b"")):
                assert index not in found or found.read(index)[1] == line


def test_damaged_first_line_is_refused(tmp_path: Path) -> None:
    data = bytearray(b"".join(write_records(tmp_path)))
    data[20] ^= 1
    (tmp_path / "j").write_bytes(data)
    with pytest.raises(GetpError, match=r"first line is damaged.*restart starts over"):
        journal(tmp_path)
    with journal(tmp_path, restart=True) as new:
        assert new.done == 0


@pytest.mark.parametrize(
    "content", [b"1 + 3", b"[]", b"{}", b'{"fingerprint": 3, "seed": 1}', b'{"fingerprint": {}}']
)
def test_first_line_that_is_not_a_journal_header_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"%08x %s\n" % (zlib.crc32(content), content))
    with pytest.raises(GetpError, match=r"first line is damaged.*restart starts over"):
        journal(tmp_path)


def test_journal_of_another_job_is_refused_with_both_values(tmp_path: Path) -> None:
    write_records(tmp_path)
    other = {"fingerprint": {"temperature": 0.7, "input": "abc"}, "seed": 1}
    with pytest.raises(GetpError, match=r"temperature 0\.0, now 0\.7\..*restart"):
        journal(tmp_path, other)
    with journal(tmp_path, other, restart=True) as new:
        assert (new.done, new.header) == (0, other)


def test_journal_without_requests_does_not_bind_the_next_job(tmp_path: Path) -> None:
    other = {"fingerprint": {"temperature": 0.7, "input": "abc"}, "seed": 2}
    journal(tmp_path).close()
    with journal(tmp_path, other) as new:
        assert new.header == other
        new.append(1, True, b"1 2")
    with pytest.raises(GetpError, match=r"temperature 0\.7, now 0\.0\."):
        journal(tmp_path)


def test_lock_refuses_a_second_process_and_is_released_by_a_dead_one(tmp_path: Path) -> None:
    with journal(tmp_path), pytest.raises(GetpError, match="another process is running this job"):
        journal(tmp_path)
    child = os.fork()
    if not child:
        journal(tmp_path).append(1, True, b"from the dead")
        os._exit(0)  # like a killed process: nothing is closed
    os.waitpid(child, 0)
    with journal(tmp_path) as found:
        assert found.read(1) == (True, b"from the dead")


def test_record_damaged_while_the_job_runs_is_detected_when_read(tmp_path: Path) -> None:
    with journal(tmp_path) as new:
        new.append(1, True, b"good")
        data = (tmp_path / "j").read_bytes()
        (tmp_path / "j").write_bytes(data.replace(b"good", b"bad!"))
        with pytest.raises(GetpError, match="record of request 1 is damaged"):
            new.read(1)


def test_records_beyond_the_end_of_the_input_count_as_damaged(tmp_path: Path) -> None:
    write_records(tmp_path)
    with Journal(str(tmp_path / "j"), HEADER, range(3)) as found:
        assert (found.done, found.damaged) == (2, 1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failed_partial_write_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real: Callable[..., int] = os.pwrite
    with journal(tmp_path) as new:
        new.append(1, True, b"one")
        calls = 0

        def pwrite(fd: int, data: bytes, at: int) -> int:
            nonlocal calls
            calls += 1
            if calls == 1:
                return real(fd, data[:7], at)
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(GetpError, match=f"{os.strerror(code)}; 1 of 10 requests are saved"):
            new.append(2, True, b"two")
        monkeypatch.setattr(os, "pwrite", real)
    with journal(tmp_path) as found:
        assert (found.done, found.damaged) == (1, 0)
        assert 1 in found


def test_failed_fsync_stops_the_job_at_the_next_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with journal(tmp_path, flush_s=60) as new:

        def fsync(descriptor: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(GetpError, match="Input/output error"):
            new.sync()
        with pytest.raises(GetpError, match="Input/output error"):
            new.append(1, True, b"one")


def test_truncation_by_another_program_is_detected_and_its_advice_works(tmp_path: Path) -> None:
    lines = write_records(tmp_path)
    size = len(b"".join(lines))
    for length in range(size):
        (tmp_path / "j").write_bytes(b"".join(lines))
        kept = max(b"".join(lines)[:length].count(b"\n") - 1, 0)
        with journal(tmp_path) as running:
            os.truncate(tmp_path / "j", length)
            with pytest.raises(GetpError, match="j was truncated by another program") as refused:
                running.append(9, True, b"next")
            assert f"{3 - kept} of 3 finished requests are lost. Repeat" in str(refused.value)
            assert running.done == kept  # what the hint to resume says
        with journal(tmp_path, {**HEADER, "seed": 2}) as again:
            assert (again.done, again.damaged) == (kept, 0)
            assert again.header == HEADER
            again.append(9, True, b"next")
            assert again.read(9) == (True, b"next")


def test_damage_to_all_of_a_journal_while_it_is_read_leaves_one_that_can_be_resumed(
    tmp_path: Path,
) -> None:
    write_records(tmp_path)
    size = (tmp_path / "j").stat().st_size
    for damage in (b"", b"\0" * size, b"x" * size, b"a line\n" * 99):
        with journal(tmp_path) as running:
            running.append(7, True, b"1 2")
            (tmp_path / "j").write_bytes(damage)
            with pytest.raises(GetpError, match=r"was changed while the job ran.* in all\. Repeat"):
                running.read(7)
        with journal(tmp_path) as again:
            assert (again.done, again.header) == (0, HEADER)
            again.append(4, True, b"1 2 3")
