"""JSONL in and out, checked with the types of OpenAI's own package."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletion

from engine import Completion, Request, SamplingParams
from engine.request import TokenLogprobs
from getp.errors import SOME_FAILED
from getp.job import run as job_run
from getp.job.request_reader import RequestDefaults, SeenIds
from getp.job.run import Job
from getp.text.answer_text import AnswerOptions
from tests.getp.helpers import FakeEngine, small_tokenizer
from tokenizer import Tokenizer

TOKENIZER = small_tokenizer()
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


class Engine(FakeEngine):
    """A fake engine that also returns log-probabilities."""

    def _completion(self, request: Request, ids: list[int], reason: str) -> Completion:
        done = super()._completion(request, ids, reason)
        if request.params.logprobs is None:
            return done
        top = tuple((token_id, -0.5) for token_id in range(request.params.logprobs))
        at = TokenLogprobs(float("-inf"), top)
        return Completion(**{**done.__dict__, "logprobs": [at] * len(ids)})


def run(
    tmp_path: Path,
    lines: Sequence[Any],
    output: str = "out.jsonl",
    engine: Any = None,
    tokenizer: Tokenizer = TOKENIZER,
    **rest: Any,
) -> tuple[int, list[Any]]:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    params = SamplingParams(max_positions=1024, stop_ids=TOKENIZER.stop_ids)
    defaults = RequestDefaults(params, answer=AnswerOptions(**rest))
    job = Job(str(source), str(tmp_path / output), "small", defaults)
    engine = engine or Engine()
    status = job_run.run_job(job, job_run.read(job), tokenizer, engine)
    if not output.endswith(".jsonl"):
        return status, (tmp_path / output).read_text().splitlines()
    return status, [json.loads(line) for line in (tmp_path / output).open(encoding="utf-8")]


def batch_line(url: str, custom_id: str = "a", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", **body}}


def calls(arguments: Any = "{}") -> dict[str, Any]:
    """A message of the assistant that calls a tool."""
    function = {"name": "f", "arguments": arguments}
    call = {"id": "call_1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def body(record: Any) -> Any:
    assert record["error"] is None, record
    assert record["response"]["status_code"] == 200
    return record["response"]["body"]


def test_chat_completion_has_the_types_of_openai(tmp_path: Path) -> None:
    request = batch_line(CHAT, "x", messages=HI, logprobs=True, top_logprobs=2, max_tokens=5)
    status, (record,) = run(tmp_path, [request])
    assert (status, record["custom_id"], set(record)) == (
        0,
        "x",
        {"id", "custom_id", "response", "error"},
    )
    reply = ChatCompletion.model_validate(body(record), strict=True)
    (choice,) = reply.choices
    assert (reply.model, choice.finish_reason, choice.message.role) == (
        "small",
        "length",
        "assistant",
    )
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 5
    assert choice.logprobs.content[0].logprob == -9999.0
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 5
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 5


def test_text_completion_has_the_types_of_openai(tmp_path: Path) -> None:
    _, (record, ids) = run(
        tmp_path,
        [
            batch_line(TEXT, "x", prompt="naïve 你", logprobs=1),
            batch_line(TEXT, "y", prompt=TOKENIZER.encode("hello")),
        ],
    )
    reply = OpenAICompletion.model_validate(body(record), strict=True)
    (choice,) = reply.choices
    assert (choice.text, reply.object) == ("naïve 你", "text_completion")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.text_offset is not None
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset)
    assert body(ids)["choices"][0]["text"] == "hello"


def test_reasoning_is_separate_from_the_answer(tmp_path: Path) -> None:
    generated = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>4"
    )
    engine = Engine(lambda prompt: TOKENIZER.encode(generated))
    _, (record,) = run(tmp_path, [batch_line(CHAT, messages=HI)], engine=engine)
    message = ChatCompletion.model_validate(body(record), strict=True).choices[0].message
    assert message.content == "4"
    assert message.model_extra == {"reasoning_content": "hm"}


def test_parameters_of_a_request_reach_the_engine(tmp_path: Path) -> None:
    engine = Engine()
    lines = [
        batch_line(
            CHAT, "a", messages=HI, max_completion_tokens=3, temperature=1, top_p=0.5, seed=-1
        ),
        {"prompt": "plain", "id": 7, "top_k": 4, "ignore_eos": True, "temperature": None},
        {"messages": HI, "max_tokens": 2, "n": 1, "stream": False, "frequency_penalty": 0.0},
    ]
    status, records = run(tmp_path, lines, engine=engine)
    assert status == 0
    first, second, third = (
        request.params for request in sorted(engine.requests, key=lambda r: r.request_id)
    )
    assert (first.max_new_tokens, first.temperature, first.top_p) == (3, 1.0, 0.5)
    assert first.seed == 2**63 - 1
    assert (second.top_k, second.ignore_eos, second.stop_ids) == (4, True, frozenset())
    assert (third.max_new_tokens, third.max_positions) == (2, 1024)
    assert [record["custom_id"] for record in records] == ["a", "7", "request-2"]


def test_stop_string_of_a_request_truncates_its_text(tmp_path: Path) -> None:
    lines = [{"prompt": "one two three", "stop": [" tw"]}, {"prompt": "one two"}]
    _, (cut, whole) = run(tmp_path, lines, stops=("never",))
    assert body(cut)["choices"][0] == {
        "index": 0, "text": "one", "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    assert body(whole)["choices"][0]["text"] == "one two"


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("{", "invalid_json", "JSON"),
        ("[1]", "invalid_json", "object"),
        ("[" * 100_000, "invalid_json", "JSON"),
        ('{"prompt": "x", "temperature": NaN}', "invalid_json", "NaN"),
        ({}, "missing_parameter", "'prompt'"),
        ({"prompt": ""}, "empty_prompt", "empty"),
        ({"prompt": []}, "invalid_value", "'prompt'"),
        ({"prompt": ["a", "b"]}, "invalid_value", "several lines"),
        ({"prompt": "\ud800"}, "not_encodable", "character 0 is half of a surrogate pair"),
        ({"prompt": "x", "nonsense": 1}, "unknown_parameter", "'nonsense'"),
        ({"prompt": "x", "n": 0}, "invalid_value", "'n' must be from 1 to 128, not 0"),
        ({"prompt": "x", "n": True}, "invalid_value", "'n' must be an integer"),
        ({"prompt": "x", "n": 3, "best_of": 2}, "invalid_value", "at least 'n', which is 3"),
        (
            {"prompt": "x", "logit_bias": {"a": 5}},
            "invalid_value",
            "values are numbers",
        ),
        ({"prompt": "x", "bad_words": [""]}, "invalid_value", "'bad_words'"),
        ({"prompt": "x", "stop_token_ids": "5"}, "invalid_value", "'stop_token_ids'"),
        ({"prompt": "x", "min_tokens": 9, "max_tokens": 8}, "invalid_value", "most 'max_tokens'"),
        ({"prompt": "x", "skip_special_tokens": 1}, "invalid_value", "true or false, not 1"),
        ({"prompt": "x", "temperature": -1}, "invalid_value", "temperature"),
        ({"prompt": "x", "temperature": "1"}, "invalid_value", "'temperature'"),
        ({"prompt": "x", "max_tokens": -1}, "invalid_value", "'max_tokens' must be 0 or more"),
        ({"prompt": "x", "max_tokens": "5"}, "invalid_value", "the string '5': remove the quotes"),
        ({"prompt": "x", "max_tokens": 2.5}, "invalid_value", "an integer, not 2.5"),
        ({"prompt": "x", "max_tokens": 1e300}, "invalid_value", "at most 64 bits"),
        ({"prompt": "x", "logprobs": 21}, "invalid_value", "'logprobs'"),
        ({"prompt": "x", "logprobs": True}, "invalid_value", "'logprobs'"),
        ({"prompt": "x", "top_k": -2}, "invalid_value", "'top_k'"),
        ({"prompt": "x", "min_p": 1.1}, "invalid_value", "'min_p' must be from 0 to 1, not 1.1"),
        ({"prompt": "x", "presence_penalty": 3}, "invalid_value", "'presence_penalty' must be"),
        ({"prompt": "x", "guided_json": 5}, "invalid_value", "'guided_json'"),
        ({"prompt": "x", "top_logprobs": 1}, "unsupported_parameter", "only to chats"),
        ({"prompt": "x", "messages": HI}, "invalid_value", "'messages' and 'prompt' are both"),
        ({"custom_id": "c"}, "missing_parameter", "'prompt' or 'messages'"),
        ({"prompt": "x", "stop": [""]}, "invalid_value", "'stop'"),
        ({"prompt": "x", "stop": "y" * 2000}, "invalid_value", "'stop'"),
        ({"prompt": "x", "id": ["i"]}, "invalid_id", "id"),
        ({"prompt": "x", "id": "again"}, "duplicate_custom_id", "'again'"),
        ({"messages": []}, "invalid_value", "at least one message"),
        ({"messages": [{"content": "x"}]}, "invalid_value", "message 1 of 'messages' must be"),
        ({"messages": [*HI, {"role": "user", "content": None}]}, "invalid_value", "message 2"),
        ({"messages": [*HI, calls('{"a": ')]}, "invalid_value", "'f' are not valid JSON"),
        ({"messages": [*HI, calls("[" * 100_000)]}, "invalid_value", "'f' are not valid JSON"),
        ({"messages": [*HI, calls("5")]}, "invalid_value", "'f' must be a JSON object"),
        ({"messages": [*HI, {**calls(), "tool_calls": [{}]}]}, "invalid_value", "'function'"),
        ({"messages": [*HI, {**calls(), "tool_calls": "f"}]}, "invalid_value", "must be a list"),
        (
            batch_line(CHAT, messages=HI, max_tokens=5, max_completion_tokens=6),
            "invalid_value",
            "differ",
        ),
        (batch_line(CHAT, messages=HI, tools=[{}]), "invalid_value", "'tools'"),
        (batch_line(CHAT, messages=HI, top_logprobs=2), "invalid_value", "'logprobs': true"),
        (batch_line(CHAT, messages=HI, top_logprobs=21, logprobs=True), "invalid_value", "'top_l"),
        (batch_line(CHAT, messages=HI, prompt="x"), "invalid_value", "are both given"),
        (batch_line(TEXT, messages=HI), "unknown_parameter", "needs 'prompt'; 'messages' belongs"),
        (batch_line(CHAT, messages=HI, echo=True), "unsupported_parameter", "'echo'"),
        (batch_line(CHAT, messages=HI, reasoning_effort=3), "invalid_value", "a string, not 3"),
        (
            batch_line(CHAT, messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "unsupported_content",
            "has the part {'type': 'image_url'}",
        ),
        (batch_line(CHAT, prompt="x"), "unknown_parameter", "'prompt'"),
        (batch_line("/v1/embeddings", input="x"), "unsupported_url", "/v1/completions"),
        ({**batch_line(TEXT, prompt="x"), "method": "GET"}, "invalid_value", "'POST'"),
        ({**batch_line(TEXT, prompt="x"), "extra": 1}, "unknown_parameter", "'extra'"),
        ({"url": TEXT, "body": {"prompt": "x"}}, "missing_parameter", "custom_id"),
        ({"custom_id": "c", "url": TEXT, "prompt": "x"}, "missing_parameter", "'body' is missing"),
        ({"custom_id": "c", "method": "POST", "url": TEXT}, "missing_parameter", "'body' is"),
        ({"custom_id": "c", "body": {"prompt": "x"}}, "missing_parameter", "'url' is missing"),
        (
            {**batch_line(TEXT, prompt="x"), "max_tokens": 1},
            "invalid_value",
            "'max_tokens' is beside 'body'",
        ),
    ],
)
def test_bad_line_fails_with_its_reason_and_does_not_affect_others(
    tmp_path: Path, line: Any, code: str, words: str
) -> None:
    good = [{"prompt": "a", "id": "again"}, {"prompt": "z", "id": "z"}]
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "in.jsonl").write_text("\n".join([json.dumps(good[0]), text, json.dumps(good[1])]))
    job = Job(
        str(tmp_path / "in.jsonl"),
        str(tmp_path / "out.jsonl"),
        "small",
        RequestDefaults(SamplingParams()),
    )
    engine: Any = Engine()
    assert job_run.run_job(job, job_run.read(job), TOKENIZER, engine) == SOME_FAILED
    first, bad, last = map(json.loads, (tmp_path / "out.jsonl").open(encoding="utf-8"))
    assert (body(first)["choices"][0]["text"], body(last)["choices"][0]["text"]) == ("a", "z")
    assert bad["response"] is None
    assert (bad["error"]["code"], bad["error"]["line"]) == (code, 2)
    assert words in bad["error"]["message"]


def test_input_and_output_formats_can_be_combined(tmp_path: Path) -> None:
    _, rows = run(tmp_path, [{"prompt": "ab"}, {"prompt": ""}], "out.txt")
    assert rows == [" ".join(map(str, TOKENIZER.encode("ab"))), ""]
    (tmp_path / "in.txt").write_text("2\nab\n\n")
    job = Job(
        str(tmp_path / "in.txt"),
        str(tmp_path / "o.jsonl"),
        "small",
        RequestDefaults(SamplingParams()),
    )
    engine: Any = Engine()
    assert job_run.run_job(job, job_run.read(job), TOKENIZER, engine) == SOME_FAILED
    first, second = map(json.loads, (tmp_path / "o.jsonl").open())
    assert body(first)["choices"][0]["text"] == "ab"
    assert second["error"]["code"] == "empty_prompt"


@pytest.mark.parametrize("source", ["in.txt", "in.jsonl"])
@pytest.mark.parametrize("output", ["out.txt", "out.jsonl"])
@pytest.mark.parametrize("name", ["ids", "text", "jsonl"])
def test_output_format_can_be_named(tmp_path: Path, name: str, output: str, source: str) -> None:
    prompts = ["a\\b", "", "é"]
    (tmp_path / "in.txt").write_text("\n".join(["3", *prompts]) + "\n", encoding="utf-8")
    objects = (json.dumps({"prompt": text}) + "\n" for text in prompts)
    (tmp_path / "in.jsonl").write_text("".join(objects))
    defaults = RequestDefaults(SamplingParams())
    result = tmp_path / output
    job = Job(str(tmp_path / source), str(result), "small", defaults, output_format=name)
    engine: Any = Engine(lambda prompt: [*prompt, *TOKENIZER.encode("\nend")])
    assert job_run.run_job(job, job_run.read(job), TOKENIZER, engine) == SOME_FAILED
    rows = result.read_text(encoding="utf-8").splitlines()
    errors = Path(f"{result}.errors.jsonl")
    if name == "jsonl":
        first, failed, _ = map(json.loads, rows)
        assert body(first)["choices"][0]["text"] == "a\\b\nend"
        assert failed["error"]["code"] == "empty_prompt"
        assert not errors.exists()
        return
    ids = [" ".join(map(str, TOKENIZER.encode(text + "\nend"))) for text in (prompts[0], "é")]
    assert rows == ([ids[0], "", ids[1]] if name == "ids" else [r"a\\b\nend", "", r"é\nend"])
    assert json.loads(errors.read_text())["code"] == "empty_prompt"


def test_text_results_have_the_answer_without_its_reasoning(tmp_path: Path) -> None:
    generated = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>4 END"
    )
    engine = Engine(lambda prompt: TOKENIZER.encode(generated))
    lines = [batch_line(CHAT, messages=HI, stop=" END")]
    (tmp_path / "in.jsonl").write_text(json.dumps(lines[0]) + "\n")
    output = str(tmp_path / "out.txt")
    params = RequestDefaults(SamplingParams(max_positions=1024))
    job = Job(str(tmp_path / "in.jsonl"), output, "small", params, output_format="text")
    assert job_run.run_job(job, job_run.read(job), TOKENIZER, cast("Any", engine)) == 0
    assert Path(output).read_text() == "4\n"


def test_nan_in_a_result_fails_only_its_request(tmp_path: Path) -> None:
    class NotANumber(FakeEngine):
        def _completion(self, request: Request, ids: list[int], reason: str) -> Completion:
            done = super()._completion(request, ids, reason)
            at = TokenLogprobs(float("nan") if request.params.logprobs else -1.0, ())
            return Completion(**{**done.__dict__, "logprobs": [at] * len(ids)})

    lines = [batch_line(TEXT, "a", prompt="hi", logprobs=1), batch_line(TEXT, "b", prompt="hi")]
    status, (bad, good) = run(tmp_path, lines, engine=NotANumber())
    assert status == SOME_FAILED
    assert "JSON" in bad["error"]["message"]
    assert body(good)["choices"][0]["text"] == "hi"


def test_error_of_the_chat_template_fails_only_its_request(tmp_path: Path) -> None:
    template = "{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}ok"
    tokenizer = small_tokenizer(template)
    lines = [{"messages": [{"role": "user", "content": text}]} for text in ("no", "yes")]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    job = Job(
        str(tmp_path / "in.jsonl"),
        str(tmp_path / "o.jsonl"),
        "small",
        RequestDefaults(SamplingParams()),
    )
    engine: Any = Engine()
    assert job_run.run_job(job, job_run.read(job), tokenizer, engine) == SOME_FAILED
    bad, good = map(json.loads, (tmp_path / "o.jsonl").open())
    assert (bad["error"]["code"], "never" in bad["error"]["message"]) == ("template_failed", True)
    assert body(good)["choices"][0]["message"]["content"] == "ok"


def test_only_requests_that_use_an_invalid_chat_template_fail(tmp_path: Path) -> None:
    lines = [batch_line(CHAT, "a", messages=[{"role": "user", "content": "hi"}])]
    lines += [batch_line(TEXT, "b", prompt="hi")]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    defaults = RequestDefaults(SamplingParams())
    job = Job(str(tmp_path / "in.jsonl"), str(tmp_path / "o.jsonl"), "small", defaults)
    engine: Any = Engine()
    tokenizer = small_tokenizer("{% for x in y %}")
    assert job_run.run_job(job, job_run.read(job), tokenizer, engine) == SOME_FAILED
    bad, good = map(json.loads, (tmp_path / "o.jsonl").open())
    assert bad["error"]["code"] == "template_failed"
    assert "the chat template is not valid" in bad["error"]["message"]
    assert body(good)["choices"][0]["text"] == "hi"


def test_seen_ids_behave_like_a_set() -> None:
    seen = SeenIds(5000)
    assert all(seen.add(str(index)) for index in range(5000))
    assert not any(seen.add(str(index)) for index in range(5000))
