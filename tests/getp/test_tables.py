"""Tables, directories of shards, URLs and parts of an input: what is read, and what is written."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import pytest

from engine import SamplingParams
from getp.cli import main as cli
from getp.errors import SOME_FAILED, GetpError
from getp.job import run as job_run
from getp.job.formats.table import Columns
from getp.job.formats.table_files import Table
from getp.job.inputs import Part, scan
from getp.job.request_reader import RequestDefaults
from getp.job.run import Job
from tests.getp.helpers import FakeEngine, small_tokenizer

TOKENIZER = small_tokenizer()
KINDS = ("parquet", "arrow", "csv", "tsv")
ROWS: list[dict[str, Any]] = [
    {"key": 7, "prompt": "What is 5 + 6?", "limit": 3, "note": "a"},
    {"key": 8, "prompt": 'naïve\n"café", déjà\tvu', "limit": None, "note": None},
    {"key": 9, "prompt": "", "limit": 2, "note": "c"},
    {"key": 10, "prompt": "What is 12 + 34?", "limit": 100, "note": "d"},
]
COLUMNS = Columns(id="key", parameters={"max_tokens": "limit"})


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1750000000")


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    table = pa.Table.from_pylist(rows)
    kind = path.suffix
    if kind == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif kind == ".arrow":
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        options = pyarrow.csv.WriteOptions(delimiter="\t" if kind == ".tsv" else ",")
        pyarrow.csv.write_csv(table, path, options)
    return str(path)


def read(path: str | Path) -> list[dict[str, Any]]:
    with open(path, "rb") as file:
        table = Table(file, Path(path).suffix[1:])
        return [row for batch in table.batches() for row in batch.to_pylist()]


def job(path: str, output: Path | str, **changes: Any) -> Job:
    defaults = RequestDefaults(SamplingParams(max_new_tokens=5), {})
    given = {"input": path, "output": str(output), "checkpoint": "small", "defaults": defaults}
    return Job(**{**given, **changes})


def run(work: Job, engine: Any = None) -> int:
    return job_run.run_job(work, job_run.read(work), TOKENIZER, engine or FakeEngine())


@pytest.mark.parametrize("kind", KINDS)
def test_results_have_the_rows_of_the_input_and_their_answers(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"in.{kind}")
    output = tmp_path / f"out.{kind}"
    assert run(job(path, output, columns=COLUMNS)) == SOME_FAILED
    found, given = read(output), read(path)
    assert [{name: row[name] for name in given[0]} for row in found] == given
    # FakeEngine repeats the prompt, at most as many tokens as the row allows.
    lengths = [len(TOKENIZER.encode(row["prompt"])) for row in ROWS]
    counts = [row["completion_tokens"] and int(row["completion_tokens"]) for row in found]
    assert [counts[0], counts[1], counts[3]] == [3, lengths[1], lengths[3]]
    assert found[3]["answer"] == ROWS[3]["prompt"]
    assert [bool(row["error"]) for row in found] == [False, False, True, False]
    assert "empty" in found[2]["error"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_read_as_the_same_requests_in_jsonl(tmp_path: Path, kind: str) -> None:
    lines = [
        {"id": row["key"], "prompt": row["prompt"], "max_tokens": row["limit"]} for row in ROWS
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(job(str(tmp_path / "in.jsonl"), tmp_path / "a.jsonl"))
    run(job(write(tmp_path / f"in.{kind}"), tmp_path / "b.jsonl", columns=COLUMNS))
    expected = [json.loads(line) for line in (tmp_path / "a.jsonl").open()]
    found = [json.loads(line) for line in (tmp_path / "b.jsonl").open()]
    for one, other in zip(found, expected, strict=True):
        assert one["custom_id"] == other["custom_id"]
        if other["error"] is None:
            assert one["response"]["body"]["choices"] == other["response"]["body"]["choices"]
        else:
            assert one["error"] == other["error"]


def test_ids_that_two_shards_have_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"id": name, "prompt": "hi", "max_tokens": 1} for name in ("a", 'q"', 'q"', "a")]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    for shard in ("1/2", "2/2"):
        assert cli.run(["-m", "getp", *files, "--shard", shard]) == 0
    assert cli.run(["-m", "merge", *files[2:]]) == 0
    err = capsys.readouterr().err
    assert 'out.jsonl: 2 requests in different shards have ids of others, the first "q\\""' in err


def test_failures_beside_a_stream_of_answers_name_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "in.csv")
    assert run(job(path, "-", columns=COLUMNS, output_format="text")) == SOME_FAILED
    assert "getp: row 3 failed: the prompt is empty" in capsys.readouterr().err


def test_messages_may_be_lists_or_json(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    nested = write(tmp_path / "a.parquet", [{"messages": messages}])
    as_text = write(tmp_path / "b.parquet", [{"messages": json.dumps(messages)}])
    in_csv = write(tmp_path / "c.csv", [{"messages": json.dumps(messages)}])
    ids = write(tmp_path / "d.parquet", [{"prompt": [1, 2, 3]}])
    prompts = []
    for path in (nested, as_text, in_csv, ids):
        engine = FakeEngine()
        assert run(job(path, tmp_path / "out.jsonl"), engine) == 0
        prompts.append(list(engine.requests[0].prompt_ids))
    assert prompts[0] == prompts[1] == prompts[2]
    assert "hi" in TOKENIZER.decode(prompts[0])
    assert prompts[3] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_parameters_in_columns_of_text_are_json_or_texts(tmp_path: Path, kind: str) -> None:
    """As in CSV, so in Parquet: data sets keep objects as JSON. Empty cells set nothing."""
    rows: list[dict[str, Any]] = [
        {"prompt": "5", "response_format": '{"type": "text"}', "stop": "4", "guided_regex": "[0]"},
        {"prompt": "", "response_format": "", "stop": '["4", "5"]', "guided_regex": ""},
    ]
    names = {name: name for name in rows[0] if name != "prompt"}
    path = write(tmp_path / f"in.{kind}", rows)
    found = [json.loads(line.data or b"") for line in scan(path, Columns(parameters=names)).lines()]
    assert found == [
        {"prompt": "5", "response_format": {"type": "text"}, "stop": "4", "guided_regex": "[0]"},
        {"prompt": "", "stop": ["4", "5"]},
    ]


def test_invalid_utf8_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"prompt\nab\n\xff\xfe\ncd\n")
    table = pa.table({"prompt": pa.array([b"ab", b"\xff\xfe", b"cd"]).view(pa.string())})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    for name in ("in.csv", "in.parquet"):
        output = tmp_path / "out.jsonl"
        assert run(job(str(tmp_path / name), output)) == SOME_FAILED
        found = [json.loads(line)["error"] for line in output.open()]
        assert [each and each["code"] for each in found] == [None, "invalid_utf8", None]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (Columns("text"), "has no column 'text'; its columns: 'key', 'prompt', 'limit', 'note'"),
        (Columns("limit"), "column 'limit' has the type int64, but a prompt must be"),
        (Columns(id="nothing"), "has no column 'nothing'"),
    ],
)
def test_a_column_that_does_not_fit_is_named(
    tmp_path: Path, columns: Columns, problem: str
) -> None:
    path = write(tmp_path / "in.parquet")
    with pytest.raises(GetpError, match=problem):
        scan(path, columns)


def test_a_table_without_the_usual_columns_needs_the_option(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", [{"text": "a"}])
    assert cli.run(["-m", "getp", "-i", path, "-o", str(tmp_path / "out.jsonl")]) == 1
    assert scan(path, Columns("text")).total == 1


def test_columns_of_a_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(GetpError, match="not a table"):
        scan(str(tmp_path / "in.jsonl"), Columns("text"))


@pytest.mark.parametrize("name", ["in.parquet", "in.arrow", "in.csv"])
@pytest.mark.parametrize("data", [b"", b"PAR1", b"ARROW1\0\0", b"\0" * 99, b"a,b\n1,2,3\n"])
def test_a_damaged_table_is_one_error(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(GetpError, match=name):
        scan(str(tmp_path / name))


def test_damaged_parquet_files_never_crash(tmp_path: Path) -> None:
    data = Path(write(tmp_path / "in.parquet")).read_bytes()
    for at in range(0, len(data), 7):
        changed = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        (tmp_path / "bad.parquet").write_bytes(changed)
        try:
            scan(str(tmp_path / "bad.parquet"), COLUMNS)
        except GetpError:
            continue


def test_a_directory_of_shards_is_one_input(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    write(folder / "train" / "part-0.parquet", ROWS[:1])
    write(folder / "train" / "part-1.parquet", ROWS[1:])
    (folder / "README.md").write_text("not data")
    whole = write(tmp_path / "all.parquet")
    for path in (str(folder), str(folder / "train" / "part-*.parquet")):
        assert list(scan(path).lines()) == list(scan(whole).lines())
        output = tmp_path / "out.parquet"
        run(job(path, output, columns=COLUMNS))
        assert [row["key"] for row in read(output)] == [7, 8, 9, 10]


def test_a_saved_data_set_is_read_in_its_order(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    for name, rows in (("data-1.arrow", ROWS[:2]), ("data-0.arrow", ROWS[2:])):
        table = pa.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    prompts = [json.loads(line.data or b"")["prompt"] for line in scan(str(folder)).lines()]
    assert prompts == [row["prompt"] for row in ROWS]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["saved"]}')
    with pytest.raises(GetpError, match=r"holds the data sets saved: .* such as .*/saved"):
        scan(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([], "has no files of requests"),
        (["a.jsonl", "b.parquet"], "has 1 jsonl file and 1 parquet file: choose one kind"),
    ],
)
def test_a_directory_with_nothing_clear_to_read_is_refused(
    tmp_path: Path, names: list[str], problem: str
) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(GetpError, match=problem):
        scan(str(tmp_path))


def test_a_pattern_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GetpError, match="no file matches"):
        scan(str(tmp_path / "*.jsonl"))


def test_several_numbered_texts_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("1\nx\n")
    with pytest.raises(GetpError, match="must be a single file, not 2"):
        scan(str(tmp_path / "*.txt"))


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_input_and_output_may_be_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    import fsspec

    monkeypatch.chdir(tmp_path)
    root = f"memory://jobs-{os.getpid()}" if scheme == "memory" else f"file://{tmp_path}/remote"
    data = Path(write(tmp_path / "in.parquet")).read_bytes()
    system, folder = fsspec.core.url_to_fs(root)
    system.makedirs(f"{folder}/in", exist_ok=True)
    system.pipe_file(f"{folder}/in/part.parquet", data)
    expected = list(scan(str(tmp_path / "in.parquet")).lines())
    for path in (f"{root}/in", f"{root}/in/*.parquet", f"{root}/in/part.parquet"):
        assert list(scan(path).lines()) == expected
    work = job(f"{root}/in", f"{root}/out.parquet", columns=COLUMNS)
    assert run(work) == SOME_FAILED
    (tmp_path / "copy.parquet").write_bytes(system.cat_file(f"{folder}/out.parquet"))
    assert [row["key"] for row in read(tmp_path / "copy.parquet")] == [7, 8, 9, 10]
    assert not list(tmp_path.glob("*.journal"))


def test_an_unusable_url_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GetpError, match=r"cannot read nowhere://x/in.jsonl: .*nowhere"):
        scan("nowhere://x/in.jsonl")
    with pytest.raises(GetpError, match=r"cannot read memory://absent.jsonl: no such file"):
        scan("memory://absent.jsonl")


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet", "out.csv", "out.txt"])
def test_merged_shards_equal_the_whole_job(
    tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        tmp_path / "in.parquet", [*ROWS, *({**row, "key": row["key"] + 9} for row in ROWS)]
    )
    common = ["-m", "getp", "-i", path, "--id-column", "key", "--max-new-tokens", "4", "-s", "3"]
    common += ["-t", "1"]
    assert cli.run([*common, "-o", str(tmp_path / f"whole-{output}")]) == SOME_FAILED
    merge = ["-m", "merge", "-o", str(tmp_path / output)]
    for number in (3, 1, 2):
        assert cli.run(merge) == 1  # not all shards are there
        options = ["-o", str(tmp_path / output), "--shard", f"{number}/3"]
        assert cli.run([*common, *options]) in (0, SOME_FAILED)
    assert cli.run(merge) == 0
    whole, merged = tmp_path / f"whole-{output}", tmp_path / output
    if output == "out.jsonl":
        answers = [
            [json.loads(line)["response"] and json.loads(line)["response"]["body"]["choices"]
             for line in each.open()]
            for each in (whole, merged)
        ]  # fmt: skip
        assert answers[0] == answers[1]
    elif output == "out.parquet":
        assert read(whole) == read(merged)
    else:
        assert whole.read_bytes() == merged.read_bytes()
    # A shard that runs again has its journal beside its last results.
    shard = f"{Path(output).stem}-2-of-3{Path(output).suffix}"
    (tmp_path / f"{shard}.journal").touch()
    assert cli.run(merge) == 1
    assert f"{shard} has a journal beside it" in capsys.readouterr().err


def test_only_the_first_requests_run(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("3\na\nb\nc\n")
    source = scan(str(tmp_path / "in.txt"), part=Part(first=2))
    assert [line.data for line in source.lines()] == [b"a", b"b"]
    output = tmp_path / "out.parquet"
    run(job(write(tmp_path / "in.parquet"), output, part=Part(first=2), columns=COLUMNS))
    assert [row["key"] for row in read(output)] == [7, 8]


@pytest.mark.parametrize("value", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_a_wrong_shard_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["-m", "getp", "-i", "x", "-o", "y", "--shard", value]) == 2
    assert "is not I/N" in capsys.readouterr().err


def test_a_killed_job_on_a_table_is_resumed(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", [{**ROWS[0], "key": n} for n in range(40)])
    run(job(path, tmp_path / "expected.parquet", columns=COLUMNS))

    class Failing(FakeEngine):
        def _complete(self, request: Any) -> Any:
            if len(self.requests) == 17:
                raise RuntimeError("killed")
            return super()._complete(request)

    work = job(path, tmp_path / "out.parquet", columns=COLUMNS)
    with pytest.raises(RuntimeError):
        run(work, Failing())
    engine = FakeEngine()
    run(work, engine)
    assert len(engine.requests) == 40 - 17
    assert read(tmp_path / "out.parquet") == read(tmp_path / "expected.parquet")


def test_a_table_is_read_in_bounded_memory(tmp_path: Path) -> None:
    rows = 200_000
    table = pa.table({"prompt": ["word " * 20] * rows, "other": ["x" * 200] * rows})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=20_000)
    del table
    before = pa.total_allocated_bytes()
    peak = 0
    for number, _ in enumerate(scan(str(tmp_path / "in.parquet")).lines()):
        if number % 1000 == 0:
            peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 8 << 20
