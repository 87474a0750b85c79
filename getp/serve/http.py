"""HTTP below the routes: who may send what, how slowly, and streams of events."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from getp.serve import config
from getp.serve.errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_OPEN_PATHS = ("/", "/health")  # need no key
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class TimedProtocol(H11Protocol):
    """Closes connections whose client does not send a request's head in time, or does not read."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch(None)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()  # it refers to this connection

    def _watch(self, before: object) -> None:
        """Check regularly that the client has not left the connection as it was before."""
        current = self._awaited()
        if current is not None and current == before:
            self.transport.abort()  # it would not close before everything is sent
            return
        self._timer = self.loop.call_later(config.HEADER_S, self._watch, current)

    def _awaited(self) -> object:
        """Return what changes when the client goes on; None if it need do nothing."""
        unsent = self.transport.get_write_buffer_size()
        idle = self.cycle is None or self.cycle.response_complete
        return (self.cycle, unsent) if unsent or idle else None


class Guard:
    """Refuses requests without the key, from pages of other sites, and bodies beyond the limits."""

    def __init__(self, app: App, api_key: str | None, loopback: bool) -> None:
        """loopback: only programs on this machine can reach the server."""
        self._app, self._loopback = app, loopback
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request = Request(scope)
        try:
            self._check(request)
            limited = _limited(request, receive)
        except ApiError as error:
            return await error_response(error)(scope, receive, send)
        await self._app(scope, limited, send)

    def _check(self, request: Request) -> None:
        """Raise ApiError if the client may not do this."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self._loopback and self._key is None and _name_of(f"//{host}") not in _LOCAL_NAMES:
            # Another site's name that resolves to this machine: its page must not read answers.
            raise ApiError(403, "use the name localhost or an address", "wrong_host")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "pages of other sites may not use this server", "wrong_origin")
        # Not request.url.path, which some versions of Starlette make from the header Host.
        if self._key is None or request.scope["path"] in _OPEN_PATHS:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise ApiError(401, "send the key: Authorization: Bearer KEY", "missing_api_key")
        if not hmac.compare_digest(given.strip().encode(), self._key):
            raise ApiError(401, "the key is wrong", "invalid_api_key")


def _name_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _limited(request: Request, receive: Receive) -> Receive:
    """Return a `receive` that raises ApiError for a body that is too large or too slow."""
    upload = request.scope["path"] == "/v1/files"
    limit = config.MAX_FILE_BYTES if upload else config.MAX_BODY_BYTES
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > limit:
        raise _too_large(limit)
    received, complete = 0, False
    deadline = asyncio.get_running_loop().time() + (config.UPLOAD_S if upload else config.BODY_S)

    async def limited() -> Message:
        nonlocal received, complete
        if complete:
            return await receive()
        left = deadline - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, min(left, config.PIECE_S)))
        except asyncio.TimeoutError:
            raise ApiError(408, "the body arrives too slowly", "timeout", headers=_CLOSE) from None
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_large(limit)
        complete = not message.get("more_body", False)
        return message

    return limited


_CLOSE = {"connection": "close"}  # the rest of the body is not read


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body has more than {limit} bytes", "too_large", headers=_CLOSE)


def error_response(error: ApiError) -> JSONResponse:
    """Return the response of an error."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def json_body(request: Request) -> dict[str, Any]:
    """Return the body, a JSON object. Raises ApiError."""
    data = await request.body()
    try:
        text = data.decode()
        body = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():  # half of a surrogate pair has no place in an answer
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", "invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    return body


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


async def watch_disconnect(receive: Receive, disconnected: Callable[[], None]) -> None:
    """Call a function when the client has hung up; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    disconnected()


class EventStream:
    """A response of server-sent events."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        """events: pieces of the stream. close: is called at its end, however it ends."""
        self._events, self._close = events, close

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Send the stream."""
        watch = asyncio.ensure_future(watch_disconnect(receive, self._close))
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers.append((b"cache-control", b"no-cache"))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._close()
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
