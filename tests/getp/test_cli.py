import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import getp
from engine import EngineError
from getp import checkpoints
from getp.cli import loading
from getp.cli import main as cli
from getp.cli.click_types import Adapter
from getp.cli.settings import Settings
from getp.cli.wording import program
from getp.defaults import DEFAULT_NEW_TOKENS
from getp.job.formats import OUTPUT_FORMATS
from getp.text.result_file import read_results
from model.ops.cpu import bindings
from tests.getp.helpers import FakeEngine, write_tokenizer
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory with a tokenizer, and a fake engine that needs nothing else."""
    monkeypatch.setattr(loading, "load_engine", lambda settings: FakeEngine())
    return str(write_tokenizer(tmp_path / "checkpoint"))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "input.txt"
    file.write_text("2\nhello\nworld\n")
    return str(file)


def command(*args: str, **rest: Any) -> "subprocess.CompletedProcess[str]":
    script = [sys.executable, str(ROOT / "run.py"), *args]
    return subprocess.run(script, capture_output=True, text=True, check=False, **rest)


def test_help_lists_every_option_in_groups_and_imports_no_torch() -> None:
    program = (
        "import sys; from getp.cli.main import run; status = run(['--help']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    titles = re.findall(r"^(\w+):$", done.stdout, re.MULTILINE)
    assert titles == ["Job", "Prompt", "Sampling", "Length", "Engine", "Server", "Plan", "Help"]


def test_version_option_prints_the_version_of_the_package() -> None:
    done = command("--version")
    assert done.stdout == f"getp {getp.__version__}\n"
    assert f'version = "{getp.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-m", "train"], ["'-m' / '--mode'", "'train'", "'generate'", "'eval'"]),
        (["-t", "-1"], ["'--temperature'", "-1", "x>=0"]),
        (["-t", "nan"], ["'--temperature'", "nan", "finite"]),
        (["-t", "inf"], ["'--temperature'", "inf", "finite"]),
        (["-p", "nan"], ["'--top-p'", "nan", "finite"]),
        (["--min-tokens", "9", "--max-new-tokens", "2"], ["--min-tokens", "--max-new-tokens", "9"]),
        (["--flush-interval", "nan"], ["'--flush-interval'", "nan", "finite"]),
        (["--flush-interval", "inf"], ["'--flush-interval'", "inf"]),
        (["--flush-interval", "1e300"], ["'--flush-interval'", "1e+300", "0<=x<=31536000"]),
        (["--grace", "nan"], ["'--grace'", "nan", "finite"]),
        (["-m", "plan", "--price", "nan"], ["'--price'", "nan", "finite"]),
        (["--top-k", "9" * 20], ["'--top-k'", "999", "0<=x<="]),
        (["-p", "0"], ["'--top-p'", "0", "0<x<=1"]),
        (["--top-k", "x"], ["'--top-k'", "'x'", "integer"]),
        (["-n", "-5"], ["'--max-length'", "-5", "x>=0"]),
        (["--steps", "-5"], ["'--steps'", "-5", "x>=0"]),
        (["-t", "hot"], ["'--temperature'", "'hot' is not a number"]),
        (["--kv-memory", "4"], ["'--kv-memory'", "did you mean 4GiB?"]),
        (["--dtype", "fp8"], ["--dtype float8 is only available in -m plan"]),
        (["-s", "-1"], ["'--seed'", "-1", "0<=x"]),
        (["--kv-memory", "4 apples"], ["'--kv-memory'", "'4 apples'", "GiB"]),
        (["--kv-memory", "0"], ["'--kv-memory'", "'0'"]),
        (["--device", "tpu"], ["'--device'", "'tpu'", "auto, cpu, cuda"]),
        (["--device", "cuda:128"], ["'--device'", "'cuda:128'", "auto, cpu, cuda"]),
        (["--dtype", "int8"], ["'--dtype'", "'int8'", "'bfloat16'"]),
        (["--stop", ""], ["--stop", "empty"]),
        (["--line", "1"], ["--line applies only to -m decode"]),
        (["-o", "x"], ["-o/--output applies only to -m getp, -m score, -m decode and -m merge"]),
        (["--restart"], ["--restart applies only to -m getp"]),
        (["-m", "doctor", "-i", "x"], ["-i/--input applies only to -m generate, -m chat"]),
        (["-m", "profile", "-i", "x"], ["-i/--input applies only to -m generate, -m chat"]),
        (["--max-errors", "-1"], ["'--max-errors'", "-1", "x>=0"]),
        (["-y", "be kind", "--raw"], ["-y/--system", "remove --raw"]),
        (["-m", "getp", "-i", "x", "-o", "y", "-y", "be kind"], ["-y/--system", "--chat-template"]),
        (["-i", ""], ["-i/--input", "empty"]),
        (["-m", "chat", "--raw"], ["--raw", "mode chat"]),
        (["-m", "getp", "-o", "x"], ["mode getp needs -i/--input FILE"]),
        (["-m", "getp", "-i", "x"], ["mode getp needs -o/--output FILE"]),
        (["-m", "decode"], ["mode decode needs -i/--input FILE"]),
        (["-m", "eval", "-i", "x"], ["--reference FILE or --expected FILE"]),
        (
            ["-m", "eval", "-t", "1"],
            ["-t/--temperature applies only to -m generate, -m chat"],
        ),
        (["--nonsense"], ["--nonsense"]),
        (["-z", "/nowhere"], ["-z/--tokenizer /nowhere does not exist", "OWNER/NAME"]),
    ],
)
def test_error_of_an_invalid_value_names_the_option_and_the_allowed_values(
    checkpoint: str, capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]
) -> None:
    prompt = [] if "-i" in args or "-m" in args else ["-i", "hi"]
    assert cli.run([checkpoint, *prompt, *args]) == 2
    out, err = capsys.readouterr()
    first = err.splitlines()[0]
    assert not out
    assert first.startswith("getp: error: ")
    for word in words:
        assert word in first


def test_unknown_cpu_kernels_give_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GETP_CPU_KERNELS", "bogus")
    bindings.library.cache_clear()
    try:
        assert cli.run(["-i", "hi"]) == 1
    finally:
        bindings.library.cache_clear()
    assert capsys.readouterr().err.startswith("getp: error: GETP_CPU_KERNELS must be none, avx2")


def test_error_names_a_checkpoint_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["/no/model", "-i", "hi"]) == 2
    assert "/no/model" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["data/model", "getp/data/model"])
def test_embedded_model_is_found_in_the_source_and_in_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: str
) -> None:
    monkeypatch.setattr(loading, "load_engine", lambda settings: FakeEngine())
    monkeypatch.setattr(checkpoints, "_GETP", tmp_path / "getp")
    assert cli.run(["-i", "hi"]) == 1
    assert "the embedded model is missing" in capsys.readouterr().err
    (tmp_path / data).parent.mkdir(parents=True)
    write_tokenizer(tmp_path / data)
    assert cli.run(["-i", "hi"]) == 0
    assert capsys.readouterr().out == "hi\n"


def test_command_line_runs_a_job_then_decodes_and_evaluates_it(
    checkpoint: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out.txt")
    report = str(tmp_path / "report.json")
    args = [checkpoint, "-m", "getp", "-i", prompts, "-o", output]
    assert cli.run([*args, "--report", report]) == 0
    assert len(read_results(output)) == 2
    assert capsys.readouterr().out.startswith("elapsed time(s): ")
    assert json.loads(Path(report).read_text())["checkpoint"] == "checkpoint"
    assert cli.run([checkpoint, "-m", "decode", "-i", output]) == 0
    assert capsys.readouterr().out == "hello\nworld\n"
    assert cli.run(["-m", "eval", "-i", output, "--reference", output, "--report", report]) == 0
    assert "2 of 2" in capsys.readouterr().out
    assert json.loads(Path(report).read_text())["reference"]["lines_equal"] == 2


BE_KIND = "<|start|>system<|message|>be kind<|end|>"
HELLO_IN_TEMPLATE = "<|start|>user<|message|>hello<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("options", "has_template", "prompt", "note"),
    [
        ([], True, HELLO_IN_TEMPLATE, True),
        (["--chat-template"], True, HELLO_IN_TEMPLATE, False),
        (["-y", "be kind"], True, BE_KIND + HELLO_IN_TEMPLATE, True),
        (["--raw"], True, "hello", False),
        ([], False, "hello", False),
    ],
)
def test_generate_uses_the_chat_template_of_a_checkpoint_that_has_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    has_template: bool,
    prompt: str,
    note: bool,
) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(loading, "load_engine", lambda settings: engine)
    folder = write_tokenizer(tmp_path / "model", **({} if has_template else {"template": None}))
    assert cli.run([str(folder), "-m", "generate", "-i", "hello", *options]) == 0
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(engine.requests[0].prompt_ids, skip_special=False) == prompt
    line = "getp: using the model's chat template (--raw: complete the bare text)\n"
    assert (line in capsys.readouterr().err) == note


def test_the_notes_on_settings_and_template_are_dim_on_a_terminal(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert cli.run([checkpoint, "-i", "hello"]) == 0
    settings, template, *_ = capsys.readouterr().err.splitlines()
    assert settings.startswith("\x1b[2mgetp: temperature 0 (greedy")
    assert template.startswith("\x1b[2mgetp: using the model's chat template (--raw")


def test_system_prompt_without_a_chat_template_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "load_engine", lambda settings: FakeEngine())
    folder = write_tokenizer(tmp_path / "model", template=None)
    assert cli.run([str(folder), "-i", "hello", "-y", "be kind"]) == 1
    assert "this model has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "options", "note"),
    [
        ("prompts.txt", [], True),
        ("prompts.txt", ["--raw"], False),
        ("prompts.txt", ["--chat-template"], False),
        ("prompts.jsonl", [], False),
    ],
)
def test_text_job_says_that_it_does_not_use_the_chat_template(
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    options: list[str],
    note: bool,
) -> None:
    (tmp_path / "prompts.txt").write_text("1\nhello\n")
    (tmp_path / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    args = [checkpoint, "-m", "getp", "-i", str(tmp_path / file), "-o", str(tmp_path / "out")]
    assert cli.run([*args, *options]) == 0
    line = (
        "getp: prompts are completed as they are; --chat-template applies the model's chat "
        "template\n"
    )
    assert capsys.readouterr().err.count(line) == note


def test_end_of_a_job_says_how_to_read_token_ids(
    checkpoint: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed command works as it stands."""
    output = str(tmp_path / "my out.txt")
    args = [checkpoint, "-m", "getp", "-i", prompts, "-z", checkpoint]
    assert cli.run([*args, "-o", output]) == 0
    hint, line = capsys.readouterr().err.splitlines()[-2:]
    assert hint == (
        f"getp: {output} has token ids; this prints the answers as text (or use --output-format "
        "text):"
    )
    name, *words = shlex.split(line)
    assert name == "getp"
    assert cli.run(words) == 0
    assert capsys.readouterr().out == "hello\nworld\n"
    for rest in (["-o", output, "--output-format", "text"], ["-o", output + ".jsonl"], ["-o", "-"]):
        assert cli.run([*args, *rest]) == 0
        assert "token ids" not in capsys.readouterr().err


def test_job_without_any_answer_does_not_say_how_to_read_them(
    checkpoint: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [checkpoint, "-m", "getp", "-i", prompts, "-o", str(tmp_path / "out.txt"), "-n", "1"]
    assert cli.run(args) == 3
    assert "token ids" not in capsys.readouterr().err


def test_hint_names_the_program_as_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", "/usr/bin")  # an activated environment would change the hint
    monkeypatch.setattr(sys, "argv", ["run.py", "-m", "getp"])
    monkeypatch.setattr(sys, "executable", str(ROOT / ".venv" / "bin" / "python"))
    assert program() == [".venv/bin/python", "run.py"]
    monkeypatch.setattr(sys, "executable", "/opt/bin/python3.11")
    assert program() == ["/opt/bin/python3.11", "run.py"]
    monkeypatch.setattr("shutil.which", lambda name: f"/opt/bin/{name}3.11")
    assert program() == ["python", "run.py"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/getp"])
    assert program() == ["getp"]


def test_output_formats_of_the_option_are_those_of_a_job() -> None:
    (option,) = (one for one in cli.command.params if one.name == "output_format")
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == list(OUTPUT_FORMATS)


def test_exit_status_is_3_if_some_requests_failed(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "input.txt").write_text("3\nhello\n\n\n")
    for name, where in (("out.txt", "out.txt.errors.jsonl"), ("out.jsonl", "out.jsonl")):
        output = str(tmp_path / name)
        job = [checkpoint, "-m", "getp", "-i", str(tmp_path / "input.txt"), "-o", output]
        assert cli.run(job) == 3
        expected = (
            f"2 of 3 requests failed: see {tmp_path / where}; the first is line 3: "
            "the prompt is empty"
        )
        assert expected in capsys.readouterr().err


def test_errors_of_a_job_name_the_options(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "input.txt").write_text("2\nhello\n\n")
    args = [checkpoint, "-m", "getp", "-i", str(tmp_path / "input.txt")]
    assert cli.run([*args, "-o", str(tmp_path / "out.txt"), "--max-errors", "0"]) == 1
    hint, error = capsys.readouterr().err.splitlines()[-2:]
    assert "raise --max-errors to resume, or start over with --restart" in hint
    assert "failed requests: 1, more than --max-errors 0; the last one: line 3" in error
    assert cli.run([*args, "-o", str(tmp_path / "out.txt"), "-t", "0.5", "-s", "1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "started with -t/--temperature 0.0, now 0.5; -s/--seed" in error
    assert "add --restart to start over" in error


def test_tp_is_short_for_tensor_parallel_and_not_a_temperature(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["-m", "plan", "-tp", "4"]) == 2
    assert "--tensor-parallel: this model" in capsys.readouterr().err


def test_errors_of_the_engine_name_the_options(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_engine(settings: Settings) -> FakeEngine:
        raise EngineError("{count} blocks are too few; raise {kv_memory}", count=3)

    monkeypatch.setattr(loading, "load_engine", load_engine)
    assert cli.run([checkpoint, "-i", "hi"]) == 1
    assert capsys.readouterr().err == "getp: error: 3 blocks are too few; raise --kv-memory\n"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere", "Give a directory, or the name of a model on the Hugging Face Hub, OWNER/NAME"),
        ("What is it?", "does not exist. A prompt is given with -i/--input"),
        ("file", "is neither a model directory nor a GGUF file (an input file is given with -i"),
        ("model/config.json", "is not a GGUF file: give the directory, "),
        ("empty", "is not a Hugging Face model directory (no config.json, no tokenizer.json)"),
    ],
)
def test_wrong_checkpoint_path_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, words: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert cli.run([str(tmp_path / path), "-i", "hi"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "output", "words"),
    [
        ("3\na\n", "out.txt", "line 1 says 3 prompts, but the file has only 1"),
        ("1\na\n", "no/where/out.txt", "no/where does not exist"),
        ("1\na\n", "", "the name of the output file must not be empty"),
        (None, "out.txt", "cannot read"),
    ],
)
def test_wrong_files_are_reported_before_the_model_loads(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    output: str,
    words: str,
) -> None:
    monkeypatch.setattr(loading, "load_engine", None)  # calling it would raise a different error
    if content is not None:
        (tmp_path / "input.txt").write_text(content)
    files = ["-i", str(tmp_path / "input.txt"), "-o", str(tmp_path / output) if output else ""]
    assert cli.run([checkpoint, "-m", "getp", *files]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("getp: error: ")
    assert words in line


def test_random_seed_is_printed_and_reproduces_the_run(
    checkpoint: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    engines: list[FakeEngine] = []

    def load_engine(settings: Settings) -> FakeEngine:
        engines.append(FakeEngine())
        return engines[-1]

    monkeypatch.setattr(loading, "load_engine", load_engine)
    args = [checkpoint, "-m", "getp", "-i", prompts, "-o", str(tmp_path / "out.txt"), "-t", "0.7"]
    assert cli.run(args) == 0
    found = re.search(r"seed (\d+) \(random\)", capsys.readouterr().err)
    assert found is not None
    assert cli.run([*args, "-s", found[1]]) == 0
    seeds = [[request.params.seed for request in engine.requests] for engine in engines]
    assert seeds[0] == seeds[1]
    assert f"seed {found[1]} (-s/--seed)" in capsys.readouterr().err


def test_sampling_options_are_passed_to_the_requests(
    checkpoint: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(loading, "load_engine", lambda settings: engine)
    args = [checkpoint, "-m", "getp", "-i", prompts, "-o", str(tmp_path / "out.txt")]
    assert cli.run([*args, "-n", "0", "--max-new-tokens", "3", "--top-k", "5", "-p", "0.5"]) == 0
    params = engine.requests[0].params
    assert (params.max_positions, params.max_new_tokens) == (None, 3)
    assert (params.temperature, params.top_k, params.top_p) == (0.0, 5, 0.5)
    assert len(params.stop_ids) == 1
    assert cli.run([*args, "--ignore-eos"]) == 0
    params = engine.requests[-1].params
    assert params.ignore_eos
    assert params.stop_ids == frozenset()
    assert params.max_positions == 1024
    assert cli.run([*args, "--max-new-tokens", "3", "--restart"]) == 0
    assert engine.requests[-1].params.max_positions is None


def test_max_tokens_of_a_request_is_limited_only_by_an_explicit_length(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(loading, "load_engine", lambda settings: engine)
    source = tmp_path / "in.jsonl"
    own = {"prompt": "hi", "max_tokens": 2000}
    source.write_text("".join(json.dumps(line) + "\n" for line in (own, {"prompt": "hi"})))
    args = [checkpoint, "-m", "getp", "-i", str(source), "-o", str(tmp_path / "out.jsonl")]
    first = ["--schedule", "first"]
    for given, limits in (
        (first, [(None, 2000), (None, DEFAULT_NEW_TOKENS)]),
        ([*first, "--restart", "--max-new-tokens", "9"], [(None, 2000), (None, 9)]),
        ([*first, "--restart", "-n", "0"], [(None, 2000), (None, None)]),
        ([*first, "--restart", "-n", "50"], [(50, 2000), (50, None)]),
        ([*first, "--restart", "--max-length", "60"], [(60, 2000), (60, None)]),
        ([*first, "--restart", "--steps", "70"], [(70, 2000), (70, None)]),
    ):
        assert cli.run([*args, *given]) == 0
        last = sorted(engine.requests[-2:], key=lambda request: request.request_id)
        found = [(each.params.max_positions, each.params.max_new_tokens) for each in last]
        assert found == limits


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 2**29), ("4gib", 2**32), ("1.5GB", 1_500_000_000), ("4096", 4096)]
)
def test_sizes_are_parsed_with_their_units(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, text: str, size: int
) -> None:
    seen = []

    def load_engine(settings: Settings) -> FakeEngine:
        seen.append(settings.engine.kv_memory)
        return FakeEngine()

    monkeypatch.setattr(loading, "load_engine", load_engine)
    assert cli.run([checkpoint, "-i", "hi", "--kv-memory", text]) == 0
    assert seen == [size]


def test_unexpected_error_is_one_line_and_debug_adds_a_traceback(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_engine(settings: Settings) -> FakeEngine:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(loading, "load_engine", load_engine)
    assert cli.run([checkpoint, "-i", "hi"]) == 1
    err = capsys.readouterr().err
    assert err == "getp: error: RuntimeError: out of memory (use --debug for a traceback)\n"
    assert cli.run([checkpoint, "-i", "hi", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_prints_one_line_and_exits_with_status_130(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_engine(settings: Settings) -> FakeEngine:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_engine", load_engine)
    assert cli.run([checkpoint, "-i", "hi"]) == 130
    assert capsys.readouterr().err.strip() == "getp: error: interrupted"


def test_closed_pipe_on_standard_output_prints_no_traceback(tmp_path: Path) -> None:
    checkpoint = write_tokenizer(tmp_path / "checkpoint")
    (tmp_path / "tokens").write_text("9 9 9 9\n" * 30_000)
    reading, writing = os.pipe()
    os.close(reading)
    script = [sys.executable, str(ROOT / "run.py"), str(checkpoint), "-m", "decode"]
    done = subprocess.run(
        [*script, "-i", str(tmp_path / "tokens")],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == b""


def test_output_works_in_a_locale_without_the_characters(tmp_path: Path) -> None:
    checkpoint = write_tokenizer(tmp_path / "checkpoint")
    (tmp_path / "tokens").write_text("9 300\n")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    args = ["-m", "eval", "-i", str(tmp_path / "tokens"), "--expected", str(tmp_path / "want")]
    (tmp_path / "want").write_bytes("é\n".encode())
    done = command(str(checkpoint), *args, env=environment)
    assert done.returncode == 0, done.stderr


def test_an_adapter_has_a_directory_and_a_weight(tmp_path: Path) -> None:
    kind, folder = Adapter(), tmp_path / "a:2"
    assert kind.convert(f"{folder}:-0.5", None, None) == (str(folder), -0.5)
    folder.mkdir()
    assert kind.convert(str(folder), None, None) == (str(folder), 1.0)
    assert kind.convert("here", None, None) == (os.path.abspath("here"), 1.0)
    for wrong in ("here:x", "here:nan"):
        with pytest.raises(click.BadParameter):
            kind.convert(wrong, None, None)
