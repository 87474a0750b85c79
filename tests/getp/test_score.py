"""Mode score, and log-probabilities of prompts in the results of requests."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from getp import LLM, SamplingParams
from getp.cli.main import command
from getp.errors import GetpError, UsageProblem
from getp.job.journal import Journal
from getp.score.formats import windows
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = Tokenizer.load(ROOT / "data/model")
PAIR = ("What is 17 plus 25?", "42 or so")


def getp(*args: object) -> int:
    status: int = command.main([str(arg) for arg in args], standalone_mode=False)
    return status


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_equal_those_of_transformers(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint("qwen2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def expected(ids: list[int], first: int = 1) -> tuple[float, bool]:
        with torch.inference_mode():
            rows = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[first - 1 :]
        tokens = torch.tensor(ids[first:])
        chosen = rows.gather(1, tokens[:, None]).sum().item()
        return chosen, bool((rows.argmax(-1) == tokens).all())

    text = "The quick brown fox sorts numbers. " * 3
    source = written(
        tmp_path / "in.jsonl",
        {"id": "t", "text": text},
        {"prompt": PAIR[0], "completion": PAIR[1]},
        {"text": 3},
        {"id": "empty", "text": ""},
    )
    source.write_text(source.read_text() + '{"text":\n')
    output, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    options = (
        "-m",
        "score",
        "-z",
        ROOT / "data/model",
        "--dtype",
        "float32",
        "--kv-memory",
        "8MiB",
    )
    status = getp(folder, *options, "-i", source, "-o", output, "--report", report)
    whole, pair, bad, empty, cut = lines_of(output)
    assert status == 3
    assert "2 of 5 texts failed; the first is line 3: it needs a" in capsys.readouterr().err
    with pytest.raises(UsageProblem, match="must be 2 or more"):
        getp(folder, *options, "-i", source, "-n", 1)
    with pytest.raises(UsageProblem, match="mode score writes its report as JSON"):
        getp(folder, *options, "-i", source, "--report", "report.html")
    assert "needs a 'text', or a 'prompt' and a 'completion'" in bad["error"]
    assert (empty["tokens"], empty["perplexity"]) == (0, None)
    assert cut["error"] == "line 5: it is not valid JSON: Expecting value at column 9"
    ids, context = TOKENIZER.encode(text), TOKENIZER.encode(PAIR[0])
    both = TOKENIZER.encode("".join(PAIR))
    for found, (logprob, is_greedy), tokens in (
        (whole, expected(ids), len(ids) - 1),
        (pair, expected(both, len(context)), len(both) - len(context)),
    ):
        assert found["logprob"] == pytest.approx(logprob, abs=1e-4 * tokens)
        assert found["perplexity"] == pytest.approx(2.718281828 ** (-logprob / tokens), rel=1e-4)
        assert (found["tokens"], found["is_greedy"]) == (tokens, is_greedy)
    totals = json.loads(report.read_text())
    assert totals["logprob"] == whole["logprob"] + pair["logprob"]
    assert (totals["texts"], totals["failed"]) == (5, 2)
    # A text file is one text, in windows of at most 16 tokens.
    (tmp_path / "long.txt").write_text(text)
    capsys.readouterr()
    assert getp(folder, *options, "-i", tmp_path / "long.txt", "-n", 16) == 0
    shown = re.search(r"log-likelihood: (-[0-9.]+), perplexity", capsys.readouterr().out)
    assert shown is not None
    parts = windows(len(ids), 1, 16)
    logprob = sum(expected(ids[start:end], first - start)[0] for start, end, first in parts)
    assert float(shown[1]) == pytest.approx(logprob, abs=1e-4 * len(ids))


@pytest.mark.parametrize(("tokens", "first", "length"), [(50, 1, 16), (50, 30, 16), (9, 4, 16)])
def test_windows_score_each_token_once_after_half_a_window(
    tokens: int, first: int, length: int
) -> None:
    found = list(windows(tokens, first, length))
    scored = [at for _, end, begin in found for at in range(begin, end)]
    assert scored == list(range(first, tokens))
    for start, end, begin in found:
        assert 0 <= start < begin < end <= min(start + length, tokens)
        assert begin - start >= length // 2 or start == 0


def test_a_run_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text("What is 17 plus 25? " * 20)
    options = ("-m", "score", "-i", tmp_path / "long.txt", "--dtype", "float32", "-n")
    assert getp(*options, 16, "-o", tmp_path / "whole.jsonl") == 0
    output, append = tmp_path / "out.jsonl", Journal.append

    def full(self: Journal, index: int, ok: bool, line: bytes) -> None:
        if self.done == 5:
            raise GetpError("the disk is full")
        append(self, index, ok, line)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        with pytest.raises(GetpError, match="the disk is full"):
            getp(*options, 16, "-o", output)
    assert re.search(r"5 of \d\d requests are done and saved", capsys.readouterr().err)
    with pytest.raises(GetpError, match=r"started with .*max_positions 16, now 24"):
        getp(*options, 24, "-o", output)
    assert getp(*options, 16, "-o", output) == 0
    assert "resuming: 5 of " in capsys.readouterr().err
    (found,), (whole,) = lines_of(output), lines_of(tmp_path / "whole.jsonl")
    assert found == whole | {  # the last digits depend on the batch
        name: pytest.approx(whole[name], rel=1e-6) for name in ("logprob", "perplexity")
    }
    assert not output.with_name("out.jsonl.journal").exists()


def test_prompts_are_part_of_the_results(tmp_path: Path) -> None:
    common = {"prompt": PAIR[0], "logprobs": 1, "temperature": 1, "seed": 1}
    source = written(
        tmp_path / "in.jsonl",
        {**common, "echo": True, "max_tokens": 1, "n": 2},
        {**common, "echo": True, "max_tokens": 0, "logprobs": None},
        {"prompt": PAIR[0], "max_tokens": 0, "prompt_logprobs": 2},
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "prompt_logprobs": 0},
        {"prompt": "".join(PAIR), "echo": True, "logprobs": 1, "max_tokens": 0},
    )
    output = tmp_path / "out.jsonl"
    assert getp("-m", "getp", "-i", source, "-o", output, "--dtype", "float32") == 0
    bodies = [line["response"]["body"] for line in lines_of(output)]
    ids = TOKENIZER.encode(PAIR[0])
    for choice in bodies[0]["choices"]:  # as lm-evaluation-harness reads them
        logprobs = choice["logprobs"]
        assert choice["text"].startswith(PAIR[0])
        assert len(choice["text"]) > len(PAIR[0])
        assert {len(column) for column in logprobs.values()} == {len(ids) + 1}
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        for value, top in zip(
            logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True
        ):
            assert value <= max(top.values()) <= 0
        at = zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
        assert all(choice["text"][offset:].startswith(token) for offset, token in at)
    (echoed,) = bodies[1]["choices"]
    assert (echoed["text"], echoed["logprobs"], echoed["finish_reason"]) == (
        PAIR[0],
        None,
        "length",
    )
    assert bodies[1]["usage"]["completion_tokens"] == 0
    (choice,) = bodies[2]["choices"]
    first, *others = choice["prompt_logprobs"]
    assert (choice["text"], first, len(others)) == ("", None, len(ids) - 1)
    values = bodies[0]["choices"][0]["logprobs"]["token_logprobs"][1:]
    for token, entry, value in zip(ids[1:], others, values, strict=False):
        assert entry[str(token)]["decoded_token"] == TOKENIZER.decode([token])
        assert entry[str(token)]["logprob"] == pytest.approx(value, abs=1e-4)
        assert {each["rank"] for each in entry.values()} >= {1, 2}
    assert bodies[3]["prompt_logprobs"][0] is None
    assert len(bodies[3]["prompt_logprobs"]) == bodies[3]["usage"]["prompt_tokens"]
    # The same scores as those of mode score.
    written(source, {"prompt": PAIR[0], "completion": PAIR[1]})
    assert getp("-m", "score", "-i", source, "-o", output, "--dtype", "float32") == 0
    (score,) = lines_of(output)
    scored = bodies[4]["choices"][0]["logprobs"]["token_logprobs"][len(ids) :]
    assert score["logprob"] == pytest.approx(sum(scored), abs=1e-3)


def test_a_library_returns_the_scores_of_prompts() -> None:
    params = SamplingParams(max_new_tokens=1, temperature=1.0, prompt_logprobs=1)
    with LLM(dtype="float32") as llm:
        scored, plain = llm.generate([PAIR[0]] * 2, [params, SamplingParams(max_new_tokens=1)], n=1)
        both, _ = llm.generate([PAIR[0]] * 2, params, n=2)
    assert scored.prompt_logprobs is not None
    assert len(scored.prompt_logprobs) == len(scored.prompt_token_ids) - 1
    assert both.prompt_logprobs is not None
    assert len(both.prompt_logprobs) == len(scored.prompt_logprobs)
    assert plain.prompt_logprobs is None


def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"### Scores.*?```\n(\{.*?)```.*?```\n(.*?)```", readme, re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(example[1])
    (words,) = (line.split()[2:] for line in example[2].splitlines())
    assert getp(*words) == 0
    right, wrong = lines_of(tmp_path / "scores.jsonl")
    assert right["is_greedy"]
    assert right["logprob"] > wrong["logprob"] + 1
    assert "texts: 2 (0 failed)" in capsys.readouterr().out
