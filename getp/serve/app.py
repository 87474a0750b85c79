"""The routes of online requests, and the state that they share."""

import asyncio
import itertools
import secrets
import time
import traceback
from contextlib import suppress
from functools import cached_property
from typing import Any

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from getp.errors import GetpError
from getp.job.formats.interface import ResultContext
from getp.serve.config import ServeConfig
from getp.serve.engine_thread import EngineThread
from getp.serve.errors import ApiError, not_found
from getp.serve.http import EventStream, error_response, json_body, watch_disconnect
from getp.serve.metrics import Metrics
from getp.serve.online import Call, Reader, full_response, new_context
from getp.serve.stream import ChunkStream
from getp.terminal import print_message
from tokenizer import Tokenizer, TokenizerError

_READING_THREADS = 4  # that encode prompts at once
_HUNG_UP = 499  # status of an answer that no client receives; nginx uses it, too


class Service:
    """The answers to online requests."""

    def __init__(self, config: ServeConfig, thread: EngineThread, tokenizer: Tokenizer) -> None:
        """thread: its engine must be warm."""
        self.config, self.thread, self.tokenizer = config, thread, tokenizer
        self.metrics = Metrics(thread)
        self.created = int(time.time())
        self.stopping = False
        self._reader = Reader(config.job, tokenizer, thread.engine.max_positions)
        self._context = ResultContext(tokenizer, config.model_name, secrets.token_hex(8), 0)
        self._numbers = itertools.count()

    @cached_property
    def _limiter(self) -> CapacityLimiter:
        return CapacityLimiter(_READING_THREADS)

    def routes(self) -> list[Route]:
        """Return the routes of this service."""
        return [
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/v1/completions", _Completions(self, chat=False), methods=["POST"]),
            Route("/v1/chat/completions", _Completions(self, chat=True), methods=["POST"]),
        ]

    def key(self) -> str:
        """Return the part of an answer's ids that identifies it."""
        return self._context.key(next(self._numbers))

    async def start(self, body: dict[str, Any], chat: bool, stream: bool) -> Call:
        """Read a body and submit its requests. Raises ApiError."""
        if self.stopping:
            raise ApiError(503, "the server is stopping", "stopping")
        name = body.get("model")
        if name is not None and name != self.config.model_name:
            raise self._no_model(str(name))
        # In a thread: long prompts and chat templates take a while.
        requests = await to_thread.run_sync(self._reader.read, body, chat, limiter=self._limiter)
        if stream and any(each.best_of > each.n for each in requests):
            raise ApiError(400, "'best_of' above 'n' cannot be streamed", "invalid_value")
        if stream and any(
            each.answer.echo or each.answer.with_prompt_logprobs for each in requests
        ):
            message = "'echo' and 'prompt_logprobs' cannot be streamed"
            raise ApiError(400, message, "invalid_value")
        return Call(self.thread, self.tokenizer, requests, stream, self.metrics)

    async def answer(self, call: Call) -> dict[str, Any]:
        """Return the body of a response when all answers are complete. Raises ApiError."""
        found = await call.completions()
        if not found:
            raise ApiError(_HUNG_UP, "the client has hung up")
        return full_response(new_context(self._context), self.key(), call.requests, found)

    async def stream(self, call: Call, usage: bool) -> EventStream:
        """Return the stream of a call. Raises ApiError if it fails before the first token."""
        events = [] if (found := await anext(call.events(), None)) is None else found
        stop_ids = self.thread.engine.model_config.stop_ids
        context = new_context(self._context)
        chunks = ChunkStream(context, self.key(), call, stop_ids, usage)
        return EventStream(chunks.pieces(events), call.close)

    async def _health(self, request: Request) -> Response:
        if self.thread.error is not None or self.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.config.model_name:
            raise self._no_model(name)
        return JSONResponse(self._model_object())

    def _no_model(self, name: str) -> ApiError:
        return not_found("model", name, f"; this server has {self.config.model_name!r}")

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self.config.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "getp",
            "max_model_len": self.thread.engine.max_positions,
        }

    async def _tokenize(self, request: Request) -> Response:
        body = await json_body(request)
        chat = body.get("messages") is not None
        ids = await to_thread.run_sync(self._reader.prompt_ids, body, chat, limiter=self._limiter)
        limit = self.thread.engine.max_positions
        return JSONResponse({"count": len(ids), "max_model_len": limit, "tokens": ids})

    async def _detokenize(self, request: Request) -> Response:
        ids = (await json_body(request)).get("tokens")
        if not isinstance(ids, list) or not all(type(each) is int and each >= 0 for each in ids):
            raise ApiError(400, "'tokens' must be a list of token ids", "invalid_value", "tokens")
        try:
            text = await to_thread.run_sync(lambda: self.tokenizer.decode(ids, skip_special=False))
        except TokenizerError as error:
            raise ApiError(400, f"'tokens': {error}", "invalid_value", "tokens") from error
        return JSONResponse({"prompt": text})


class _Completions:
    """The endpoint of text or chat completions; an ASGI app, since it watches its client."""

    def __init__(self, service: Service, chat: bool) -> None:
        self._service, self._chat = service, chat

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        body = await json_body(Request(scope, receive))
        stream, usage = _stream_options(body)
        call = await self._service.start(body, self._chat, stream)
        watch = asyncio.ensure_future(watch_disconnect(receive, call.close))
        response: Any
        try:
            if stream:
                response = await self._service.stream(call, usage)
            else:
                response = JSONResponse(await self._service.answer(call))
        except BaseException:
            call.close()
            raise
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
        await response(scope, receive, send)


def _stream_options(body: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether to stream, and whether the stream ends with the usage. Raises ApiError."""
    stream, options = body.get("stream") or False, body.get("stream_options") or {}
    if not isinstance(stream, bool):
        raise ApiError(400, "'stream' must be true or false", "invalid_value", "stream")
    usage = options.get("include_usage", False) if isinstance(options, dict) else None
    if not isinstance(usage, bool):
        wanted = "an object with 'include_usage': true or false"
        raise ApiError(400, f"'stream_options' must be {wanted}", "invalid_value", "stream_options")
    if options and not stream:
        raise ApiError(400, "'stream_options' needs 'stream': true", "invalid_value")
    return stream, usage


def make_app(service: Service, routes: list[Route]) -> ASGIApp:
    """Return the application with the routes of the service and further ones."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        service.metrics.refused.inc(error.status != _HUNG_UP)
        return error_response(error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        service.metrics.refused.inc()
        where = f"{request.method} {request.url.path[:100]}"
        return error_response(ApiError(error.status_code, f"{where}: {error.detail}"))

    async def not_stored(request: Request, error: Exception) -> Response:
        service.metrics.failed.inc()
        print_message(f"getp: error: {error}")  # which names files of this machine
        return error_response(ApiError(500, "the server cannot do this now: see its log"))

    async def hung_up(request: Request, error: Exception) -> Response:
        return Response(status_code=_HUNG_UP)

    async def unexpected(request: Request, error: Exception) -> Response:
        service.metrics.failed.inc()
        print_message("".join(traceback.format_exception(error)))
        return error_response(ApiError(500, f"{type(error).__name__}: {error}", "internal_error"))

    return Starlette(
        routes=[*service.routes(), *routes],
        exception_handlers={
            ApiError: api_error,
            HTTPException: http_error,
            ClientDisconnect: hung_up,  # before the body was complete
            GetpError: not_stored,
            Exception: unexpected,
        },
    )
