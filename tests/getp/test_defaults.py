"""Where the sampling and the length of a request come from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine import SamplingParams
from getp.analysis.job_requests import read_requests
from getp.cli import loading
from getp.cli import main as cli
from getp.defaults import DEFAULT_MAX_LENGTH, DEFAULT_NEW_TOKENS
from getp.job.request_reader import RequestDefaults
from model import CheckpointError
from model.generation import recommended_sampling, unsupported_generation
from tests.getp.helpers import FakeEngine, write_tokenizer

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}


class Checkpoint:
    """A checkpoint with a tokenizer and a fake engine, which keeps the requests that it gets."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.path = write_tokenizer(folder / "checkpoint")
        self._monkeypatch = monkeypatch

    def recommend(self, generation: Mapping[str, Any]) -> None:
        (self.path / "generation_config.json").write_text(json.dumps(generation))

    def run(self, lines: list[Any], *options: str, engine: Any = None) -> list[SamplingParams]:
        """Run a job on JSONL lines, or on text for strings; return its requests' parameters."""
        engine = engine or FakeEngine()
        self._monkeypatch.setattr(loading, "load_engine", lambda settings: engine)
        text = isinstance(lines[0], str)
        source = self.folder / ("in.txt" if text else "in.jsonl")
        rows = [str(len(lines)), *lines] if text else map(json.dumps, lines)
        source.write_text("".join(f"{row}\n" for row in rows))
        output = str(self.folder / f"out{source.suffix}")
        assert (
            cli.run([str(self.path), "-m", "getp", "-i", str(source), "-o", output, *options]) == 0
        )
        done = sorted(engine.requests, key=lambda request: request.request_id)
        return [request.params for request in done]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    return Checkpoint(tmp_path, monkeypatch)


def openai(custom_id: str = "a", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"messages": HI, **body}}


def sampling(params: SamplingParams) -> tuple[float, float, int]:
    return params.temperature, params.top_p, params.top_k


@pytest.mark.parametrize(
    ("body", "options", "generation", "expected"),
    [
        ({}, [], {}, (1.0, 1.0, 0)),
        ({"temperature": 1}, [], {}, (1.0, 1.0, 0)),
        ({"top_p": None, "temperature": None}, [], {}, (1.0, 1.0, 0)),
        ({}, [], GENERATION, (0.6, 0.95, 20)),
        ({}, [], GENERATION | {"top_k": 20.0}, (0.6, 0.95, 20)),
        ({}, ["-t", "0.2"], GENERATION, (0.2, 0.95, 20)),
        ({}, ["-p", "0.5", "--top-k", "0"], GENERATION, (0.6, 0.5, 0)),
        ({"temperature": 0.9}, ["-t", "0.2"], GENERATION, (0.9, 0.95, 20)),
        ({"top_p": 1, "top_k": -1}, ["-p", "0.5"], GENERATION, (0.6, 1.0, 0)),
        ({}, ["-t", "0"], {}, (0.0, 1.0, 0)),
        ({}, [], {"do_sample": False, "temperature": 0.6}, (0.0, 1.0, 0)),
        ({}, [], {"do_sample": True}, (1.0, 1.0, 0)),
    ],
)
def test_the_request_comes_before_options_the_checkpoint_and_the_format(
    checkpoint: Checkpoint, body: Any, options: list[str], generation: Any, expected: Any
) -> None:
    checkpoint.recommend(generation)
    (params,) = checkpoint.run([openai(**body)], *options)
    assert sampling(params) == expected


@pytest.mark.parametrize("line", ["hi", {"prompt": "hi"}, {"messages": HI}])
def test_text_and_plain_jsonl_are_greedy_unless_the_checkpoint_or_an_option_says(
    checkpoint: Checkpoint, line: Any
) -> None:
    assert sampling(checkpoint.run([line])[0]) == (0.0, 1.0, 0)
    assert sampling(checkpoint.run([line], "-t", "0.5", "--restart")[0]) == (0.5, 1.0, 0)
    checkpoint.recommend(GENERATION)
    assert sampling(checkpoint.run([line])[0]) == (0.6, 0.95, 20)


def test_a_body_without_top_p_is_sampled_as_with_1(checkpoint: Checkpoint) -> None:
    common = {"temperature": 1, "seed": 7, "max_tokens": 16}
    absent, tenth, one = checkpoint.run(
        [
            openai("absent", **common),
            openai("0.9", top_p=0.9, **common),
            openai("1", top_p=1, **common),
        ]
    )
    assert absent == one
    assert tenth.top_p == 0.9


@pytest.mark.parametrize(
    ("line", "options", "generation", "expected"),
    [
        ("hi", [], {}, (DEFAULT_MAX_LENGTH, None)),
        ("hi", ["--max-new-tokens", "9"], {}, (None, 9)),
        ("hi", ["-n", "50"], {"max_new_tokens": 7}, (50, None)),
        ("hi", [], {"max_new_tokens": 7}, (DEFAULT_MAX_LENGTH, 7)),
        ({"prompt": "hi"}, [], {}, (None, DEFAULT_NEW_TOKENS)),
        (openai(), [], {}, (None, DEFAULT_NEW_TOKENS)),
        (openai(), [], {"max_new_tokens": 7}, (None, 7)),
        (openai(), ["--max-new-tokens", "9"], {"max_new_tokens": 7}, (None, 9)),
        (openai(), ["-n", "0"], {"max_new_tokens": 7}, (None, None)),
        (openai(max_tokens=5), ["-n", "50"], {"max_new_tokens": 7}, (50, 5)),
        (openai(max_tokens=9000), [], {}, (None, 9000)),
    ],
)
def test_a_jsonl_request_without_a_length_may_use_the_models_limit(
    checkpoint: Checkpoint, line: Any, options: list[str], generation: Any, expected: Any
) -> None:
    checkpoint.recommend(generation)
    (params,) = checkpoint.run([line], *options)
    assert (params.max_positions, params.max_new_tokens) == expected


def test_a_jsonl_prompt_may_be_longer_than_1024_tokens(checkpoint: Checkpoint) -> None:
    engine = FakeEngine(lambda prompt: [7] * 10_000, max_positions=8192)
    checkpoint.run([{"prompt": "hello " * 500}, {"prompt": "x"}], engine=engine)
    long, short = map(json.loads, (checkpoint.folder / "out.jsonl").open())
    usage = [each["response"]["body"]["usage"]["completion_tokens"] for each in (long, short)]
    assert usage[1] == DEFAULT_NEW_TOKENS
    assert long["response"]["body"]["usage"]["prompt_tokens"] > DEFAULT_MAX_LENGTH


def test_a_plan_assumes_the_lengths_of_a_job(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(openai()) + "\n")
    (tmp_path / "a.txt").write_text("1\nhi\n")
    defaults = RequestDefaults(SamplingParams(), {})
    found = [read_requests(str(tmp_path / name), None, defaults) for name in ("a.jsonl", "a.txt")]
    assert [(each.limits, each.max_lengths) for each in found] == [
        ([DEFAULT_NEW_TOKENS], [None]),
        ([None], [DEFAULT_MAX_LENGTH]),
    ]


@pytest.mark.parametrize(
    ("line", "options", "generation", "words"),
    [
        (
            "hi",
            [],
            {},
            "getp: temperature 0 (greedy, default); at most 1024 tokens, prompt included (d",
        ),
        (
            "hi",
            ["-t", "0.5"],
            {},
            "temperature 0.5 (-t/--temperature), top_p 1 (default), top_k 0 (",
        ),
        ("hi", ["-s", "5", "-t", "1"], {}, "seed 5 (-s/--seed); at most 1024 tokens"),
        ("hi", ["-n", "9"], {}, "; at most 9 tokens, prompt included (-n/--max-length)"),
        ("hi", ["-n", "0"], {}, "; length up to the model's limit (-n/--max-length)"),
        (
            openai(),
            [],
            {},
            "getp: unless a request sets its own: temperature 1 in OpenAI's format, otherwise 0 "
            "(greedy, default), top_p 1 (default)",
        ),
        (openai(), [], {}, "; at most 4096 new tokens (default), within the model's limit"),
        (
            openai(),
            ["-p", "0.5"],
            GENERATION,
            "own: temperature 0.6 (generation_config.json), top_p 0.5 (-p/--top-p), top_k 20 "
            "(generation_config.json), seed ",
        ),
        (openai(), [], {"num_beams": 4}, "asks for num_beams 4, which is"),
    ],
)
def test_one_line_says_what_holds_and_why(
    checkpoint: Checkpoint,
    capsys: pytest.CaptureFixture[str],
    line: Any,
    options: list[str],
    generation: Any,
    words: str,
) -> None:
    checkpoint.recommend(generation)
    checkpoint.run([line], *options)
    assert words in capsys.readouterr().err


def test_modes_generate_and_chat_follow_the_checkpoint(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(loading, "load_engine", lambda settings: engine)
    assert cli.run([str(checkpoint.path), "-i", "hi"]) == 0
    checkpoint.recommend(GENERATION)
    assert cli.run([str(checkpoint.path), "-i", "hi", "--top-k", "3"]) == 0
    found = [sampling(request.params) for request in engine.requests]
    assert found == [(0.0, 1.0, 0), (0.6, 0.95, 3)]
    assert cli.run([str(checkpoint.path), "-i", "hi", "--generation-config", "none"]) == 0
    assert sampling(engine.requests[-1].params) == (0.0, 1.0, 0)
    err = capsys.readouterr().err
    assert "getp: temperature 0 (greedy, default); at most 1024" in err
    assert "getp: temperature 0.6 (generation_config.json), top_p 0.95 (" in err


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"temperature": "hot"}, "'temperature' must be a number of 0 or more, not 'hot'"),
        ({"temperature": -1}, "'temperature' must be"),
        ({"top_p": 1.5}, "'top_p' must be a number above 0 and at most 1, not 1.5"),
        ({"top_k": True}, "'top_k' must be an integer"),
        ({"max_new_tokens": 0}, "'max_new_tokens' must be an integer"),
        ({"do_sample": "yes"}, "'do_sample' must be true or false"),
    ],
)
def test_invalid_recommendations_name_the_file_and_the_key(
    checkpoint: Checkpoint, generation: Any, words: str
) -> None:
    checkpoint.recommend(generation)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {words}"):
        recommended_sampling(checkpoint.path)
    assert recommended_sampling(checkpoint.path, {"temperature", *generation}) == {}


def test_recommendations_at_values_without_effect_are_not_reported(checkpoint: Checkpoint) -> None:
    checkpoint.recommend({"repetition_penalty": 1.0, "min_p": None, "num_beams": 1, "top_k": -1})
    assert recommended_sampling(checkpoint.path) == {"top_k": 0, "repetition_penalty": 1}
    assert unsupported_generation(checkpoint.path) == []


class Dies(FakeEngine):
    """An engine that fails after the first request."""

    def generate(self, requests: Any) -> Any:
        yield from list(super().generate(iter([next(iter(requests))])))
        raise RuntimeError("gone")


def interrupted(checkpoint: Checkpoint, lines: list[Any], *options: str) -> Path:
    """Interrupt a job after its first request; return its journal."""
    with pytest.raises(AssertionError):
        checkpoint.run(lines, *options, "--schedule", "first", engine=Dies())
    (journal,) = checkpoint.folder.glob("*.journal")
    return journal


def rewrite_header(journal: Path, changes: Mapping[str, Any]) -> None:
    """Give a journal the fingerprint of an older version; None removes a key."""
    from getp.job.journal_header import with_checksum

    first, rest = journal.read_bytes().split(b"\n", 1)
    header = json.loads(first[9:])
    header["fingerprint"] |= changes
    for name in [name for name, value in changes.items() if value == "absent"]:
        del header["fingerprint"][name]
    journal.write_bytes(with_checksum(json.dumps(header).encode()) + rest)


def test_a_greedy_text_job_of_an_older_version_is_resumed(checkpoint: Checkpoint) -> None:
    lines = ["one", "two", "three"]
    rewrite_header(interrupted(checkpoint, lines), {"top_p": 0.9})
    engine = FakeEngine()
    checkpoint.run(lines, engine=engine)
    assert len(engine.requests) == 2


def test_a_job_with_the_old_name_of_its_output_format_is_resumed(checkpoint: Checkpoint) -> None:
    lines = ["one", "two", "three"]
    journal = interrupted(checkpoint, lines)
    assert b'"output format": "ids"' in journal.read_bytes()
    rewrite_header(journal, {"output format": "tokens"})
    engine = FakeEngine()
    checkpoint.run(lines, engine=engine)
    assert len(engine.requests) == 2


def test_a_jsonl_job_of_an_older_version_is_resumed_if_its_values_are_the_same(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [openai(name) for name in "abc"]
    options = ["-t", "0", "-p", "0.9", "-n", "50"]
    rewrite_header(interrupted(checkpoint, lines, *options), {"openai temperature": "absent"})
    with pytest.raises(AssertionError):
        checkpoint.run(lines, *options[2:])
    assert "temperature of OpenAI requests 0.0, now 1.0" in capsys.readouterr().err
    engine = FakeEngine()
    checkpoint.run(lines, *options, engine=engine)
    assert len(engine.requests) == 2


def test_the_journal_names_the_values_in_force(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [openai(name) for name in "abc"]
    interrupted(checkpoint, lines)
    for options, words in (
        (["-t", "0.5"], "temperature of OpenAI requests 1.0, now 0.5"),
        (["--max-new-tokens", "9"], "--max-new-tokens 4096, now 9"),
        (["-p", "0.9"], "-p/--top-p 1.0, now 0.9"),
    ):
        with pytest.raises(AssertionError):
            checkpoint.run(lines, *options)
        assert words in capsys.readouterr().err
