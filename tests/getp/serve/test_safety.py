"""Who may use a server, and what slow clients can hold on to."""

import asyncio
import socket
import threading
from contextlib import suppress
from typing import Any

import pytest

from getp.errors import UsageProblem
from getp.serve import config
from getp.serve.config import ServeConfig
from getp.serve.http import Guard, TimedProtocol
from getp.serve.server import _listen


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """An application whose answer is the body of the request."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})


def status(guard: Guard, path: str, headers: dict[str, str]) -> int:
    sent: list[Any] = []
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return int(sent[0]["status"])


def test_only_clients_with_the_key_are_served() -> None:
    guard = Guard(answer, "secret", loopback=False)
    host = {"host": "server.example"}
    keys = ("Bearer secret", "bearer secret", "Bearer secre", "Bearer secret1", "Basic secret", "")
    found = [status(guard, "/v1/models", {**host, "authorization": key}) for key in keys]
    assert found == [200, 200, 401, 401, 401, 401]
    assert status(guard, "/metrics", host) == 401
    assert status(guard, "/health", host) == 200
    assert status(guard, "/v1/models", {**host, "authorization": "Bearer clé"}) == 401
    assert status(guard, "/v1/models", {"host": "server.example/health?"}) == 401
    assert status(guard, "/health", {**host, "origin": "http://[server.example"}) == 403


def test_another_host_needs_a_key_or_insecure() -> None:
    job: Any = None
    with pytest.raises(UsageProblem, match="api_key"):
        _listen(ServeConfig("0.0.0.0", 0, "m", job))
    for safe in ({"api_key": "k"}, {"insecure": True}):
        _listen(ServeConfig("0.0.0.0", 0, "m", job, **safe)).close()


def test_a_client_that_does_not_read_is_disconnected(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, lost = b" " * (16 << 20), threading.Event()
    file = server.client.files.create(file=("big", data), purpose="batch")
    end = TimedProtocol.connection_lost

    def note(connection: TimedProtocol, error: Exception | None) -> None:
        end(connection, error)
        lost.set()

    monkeypatch.setattr(TimedProtocol, "connection_lost", note)
    monkeypatch.setattr(config, "HEADER_S", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        path = f"/v1/files/{file.id}/content"
        client.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        assert lost.wait(60)
        received = 0
        with suppress(OSError):
            while part := client.recv(1 << 20):
                received += len(part)
    assert received < len(data)


def test_heads_and_bodies_that_arrive_too_slowly_end(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "HEADER_S", 0.1)
    monkeypatch.setattr(config, "PIECE_S", 0.1)

    async def reply(sent: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent)
        received = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        return received

    async def replies() -> tuple[bytes, bytes, bytes, bytes]:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        return await asyncio.gather(
            reply(b""),
            reply(head),
            reply(head + b"content-length: 9\r\n\r\n{"),
            reply(b"GET /nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n1"),
        )

    nothing, partial, body, rest = asyncio.run(replies())
    assert nothing == partial == b""
    assert rest.startswith(b"HTTP/1.1 404 ")
    assert body.startswith(b"HTTP/1.1 408 ")
