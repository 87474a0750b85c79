"""Online requests, as the openai package and less polite clients send them."""

import asyncio
import json
import socket
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import openai
import pytest

from benchmarks.serve_stress import left_over, stress
from getp.serve import config
from tests.getp.serve.running import MESSAGES, MODEL, QUESTION, RunningServer, wait_until
from tests.getp.test_thinking_and_tools import write_model

LONG: dict[str, Any] = {"max_tokens": 60, "extra_body": {"ignore_eos": True}}


def test_a_stream_adds_up_to_the_whole_answer(server: RunningServer) -> None:
    chat: Any = server.client.chat.completions
    asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "logprobs": True}
    whole = chat.create(**asked)
    message = whole.choices[0].message
    assert message.content == "42"
    chunks = list(chat.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    choices = [choice for chunk in chunks for choice in chunk.choices]
    deltas = [choice.delta for choice in choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == message.content
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert reasoning == message.reasoning_content
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert [each.token for each in entries] == [
        each.token for each in whole.choices[0].logprobs.content
    ]
    assert choices[-1].finish_reason == whole.choices[0].finish_reason == "stop"


def test_text_completions_have_samples_seeds_stops_and_several_prompts(
    server: RunningServer,
) -> None:
    complete: Any = server.client.completions
    asked = {"model": MODEL, "prompt": QUESTION, "temperature": 1.5, "seed": 7, "n": 3, **LONG}
    whole = complete.create(**asked, stop=["9"], logprobs=1)
    texts = [choice.text for choice in whole.choices]
    assert len(set(texts)) == 3
    assert not any("9" in text for text in texts)
    streamed: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for chunk in complete.create(**asked, stop=["9"], logprobs=1, stream=True):
        for choice in chunk.choices:
            streamed[choice.index].append(choice)
    for index, choice in enumerate(whole.choices):
        assert "".join(part.text for part in streamed[index]) == choice.text
        assert streamed[index][-1].finish_reason == choice.finish_reason
        found = [part.logprobs.tokens for part in streamed[index] if part.logprobs]
        assert [*chain(*found)] == choice.logprobs.tokens
    several = complete.create(model=MODEL, prompt=[QUESTION, "What is 1 plus 2?"], temperature=0)
    assert [(each.index, each.text) for each in several.choices] == [(0, "42"), (1, "3")]
    ids = json.loads(post(server, "/tokenize", {"prompt": QUESTION}))["tokens"]
    assert json.loads(post(server, "/detokenize", {"tokens": ids}))["prompt"].endswith(QUESTION)
    assert complete.create(model=MODEL, prompt=ids, temperature=0).choices[0].text == "42"


def schema(name: str, *values: Any) -> dict[str, Any]:
    """The schema of objects with one property, which has one of these values."""
    found = {"type": "object", "properties": {name: {"enum": values}}, "required": [name]}
    return {**found, "additionalProperties": False}


def test_a_response_format_is_kept_in_streams_too(server: RunningServer) -> None:
    pytest.importorskip("llguidance")
    wanted = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema("sum", 42)}}
    create: Any = server.client.chat.completions.create
    asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "response_format": wanted}
    content = create(**asked).choices[0].message.content
    assert json.loads(content) == {"sum": 42}
    parts = [chunk.choices[0].delta.content or "" for chunk in create(**asked, stream=True)]
    assert "".join(parts) == content
    assert len([*filter(None, parts)]) > 1


def test_a_tool_is_called_in_streams_too(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    server = RunningServer(model=Path(write_model(tmp_path)))
    create: Any = server.client.chat.completions.create
    tool = {"type": "function", "function": {"name": "add", "parameters": schema("a", 17, 25)}}
    asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "tools": [tool]}
    asked |= {"tool_choice": "required", "parallel_tool_calls": False, "reasoning_effort": "none"}
    choice = create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "add"
    assert json.loads(call.function.arguments)["a"] in (17, 25)
    choices = [chunk.choices[0] for chunk in create(**asked, stream=True)]
    assert choices[-1].finish_reason == "tool_calls"
    parts = [each for choice in choices for each in choice.delta.tool_calls or []]
    assert parts[0].function.name == "add"
    arguments = "".join(each.function.arguments or "" for each in parts)
    assert json.loads(arguments) == json.loads(call.function.arguments)
    assert {each.index for each in parts} == {0}
    assert server.stop() == 0


def test_many_clients_at_once_get_their_own_answers(server: RunningServer) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        question = [{"role": "user", "content": f"What is {number} plus 3?"}]
        create: Any = client.chat.completions.create
        if number % 2:
            answer = await create(model=MODEL, messages=question, temperature=0)
            return str(answer.choices[0].message.content)
        stream = await create(model=MODEL, messages=question, temperature=0, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(40)))

    answers = asyncio.run(ask_all())
    assert sum(answer == str(number + 3) for number, answer in enumerate(answers)) >= 38


def post(server: RunningServer, path: str, body: Any, **headers: str) -> str:
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(response.read().decode())


COMPLETE = "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (COMPLETE, b"{", 400, "invalid_json"),
        (COMPLETE, b'{"prompt": "\\ud800"}', 400, "invalid_json"),
        (COMPLETE, b'{"prompt": "\xed\xa0\x80"}', 400, "invalid_json"),
        (COMPLETE, {"prompt": "1", "n": 0}, 400, "invalid_value"),
        (COMPLETE, {"prompt": ["1"] * 5, "n": 100}, 400, "invalid_value"),
        (COMPLETE, {"prompt": "1", "stream": "yes"}, 400, "invalid_value"),
        (COMPLETE, {"prompt": "1 " * 600}, 400, "context_length_exceeded"),
        (COMPLETE, {"prompt": [10**6]}, 400, "request_error"),
        (COMPLETE, {"prompt": "1", "guided_regex": "("}, 400, "request_error"),
        (COMPLETE, {"prompt": "1", "guided_choice": ["x" * (1 << 18)]}, 400, "invalid_value"),
        ("/detokenize", {"tokens": [10**30]}, 400, "invalid_value"),
        ("/v1/files?limit=%C2%B2", None, 400, "invalid_value"),
        ("/v1/nothing", {}, 404, None),
        ("/health", {}, 405, None),
        ("/v1/batches", {"endpoint": COMPLETE, "completion_window": "24h"}, 400, "invalid_value"),
    ],
)
def test_what_cannot_be_answered_has_an_error_in_openais_shape(
    server: RunningServer, path: str, body: Any, status: int, code: str | None
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, path, body)
    assert caught.value.code == status
    error = json.loads(caught.value.read())["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


def test_the_error_on_an_unknown_model_names_the_served_one(server: RunningServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, COMPLETE, {"model": "other", "prompt": "1"})
    error = json.loads(caught.value.read())["error"]
    assert (caught.value.code, error["code"]) == (404, "not_found")
    assert error["message"] == f"there is no model 'other'; this server has '{MODEL}'"


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(server: RunningServer) -> None:
    head = f"POST {COMPLETE} HTTP/1.1\r\nhost: localhost\r\ncontent-length: "
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        client.sendall(f"{head}{config.MAX_BODY_BYTES + 1}\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    head = f"POST {COMPLETE} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        client.sendall(head.encode())
        with suppress(OSError):  # the server closes the connection
            for _ in range(20):
                client.sendall(chunk)
            assert client.recv(100).startswith(b"HTTP/1.1 413 ")
    assert server.metric("getp_online_requests") == 0


def test_pages_of_other_sites_and_other_names_of_this_machine_are_refused(
    server: RunningServer,
) -> None:
    for header in ({"origin": "http://evil.example"}, {"host": "evil.example"}):
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(server, COMPLETE, {"prompt": "1"}, **header)
        assert caught.value.code == 403
        caught.value.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_sequences(server: RunningServer, stream: bool) -> None:
    before = server.metric("getp_cancelled_total")
    scheduler = server.engine.steps.scheduler
    body = {"prompt": QUESTION, "n": 100, "max_tokens": 480, "ignore_eos": True, "stream": stream}
    data = json.dumps(body).encode()
    head = f"POST {COMPLETE} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
    steps = server.engine.stats.steps
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + data)
        wait_until(lambda: server.engine.stats.steps > steps)
    wait_until(lambda: server.metric("getp_online_requests") == 0)
    assert server.metric("getp_cancelled_total") == before + 1
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.cache.num_used == 0
    assert server.engine.stats.steps < steps + 480


def test_a_full_queue_refuses_further_requests(server: RunningServer) -> None:
    scheduler, held = server.engine.steps.scheduler, threading.Event()
    schedule = scheduler.schedule
    hold = patch.object(scheduler, "schedule", lambda: held.wait(60) and schedule())
    try:
        with hold, pytest.raises(openai.RateLimitError) as caught:
            asyncio.run(_fill(server))
        assert caught.value.response.headers["retry-after"] == "1"
    finally:
        held.set()
    wait_until(lambda: server.metric("getp_online_requests") == 0)


async def _fill(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as client:
        create: Any = client.completions.create
        await asyncio.gather(*(create(model=MODEL, prompt="1", n=100) for _ in range(6)))


def test_impolite_clients_leave_nothing_behind(server: RunningServer) -> None:
    before = threading.active_count()
    done = asyncio.run(stress(server.port, 200, 24))
    assert sum(done.values()) == 200
    assert not any(left_over(server).values())
    scheduler = server.engine.steps.scheduler
    assert scheduler.cache.num_used == 0
    assert len(scheduler.free_rows) == server.engine.max_batch_size
    assert threading.active_count() <= before + 4  # of the pool that encodes prompts
