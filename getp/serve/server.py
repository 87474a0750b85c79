"""Starts and ends a server: the engine's thread, the socket, signals."""

import asyncio
import ipaddress
import resource
import socket
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import uvicorn

from getp.errors import GetpError, UsageProblem
from getp.job.signals import GracefulStop
from getp.serve import config as limits
from getp.serve.app import Service, make_app
from getp.serve.batch_routes import BatchRoutes
from getp.serve.batches import Batches
from getp.serve.config import ServeConfig
from getp.serve.engine_thread import EngineThread, ServeEngine
from getp.serve.http import Guard, TimedProtocol
from getp.serve.status import Status
from getp.terminal import print_message
from tokenizer import Tokenizer

_END_S = 5.0  # for the engine to end a step and to free its memory


def serve(
    config: ServeConfig,
    engine: ServeEngine,
    tokenizer: Tokenizer,
    stop: GracefulStop | None = None,
) -> int:
    """Serve until a signal arrives; return the exit status. Raises GetpError, Interrupted.

    stop: what handles signals; None: a new one with the config's time of grace.
    """
    listener = _listen(config)
    _allow_many_connections()
    thread = EngineThread(engine, config.max_queue)
    with listener, stop or GracefulStop(config.grace_s) as stop:
        thread.start()
        thread.warm.wait()
        if thread.error is not None:
            raise thread.error
        stop.allow_grace = True
        service = Service(config, thread, tokenizer)
        batches = None
        if config.data is not None:
            batches = Batches(config.data, config.job, tokenizer, thread)
        status = Status(service, batches)
        routes = [*BatchRoutes(batches).routes(), *status.routes()]
        app = Guard(make_app(service, routes), config.api_key, _is_loopback(config.host))
        server = _Server(app, config, service, stop)
        server.batches, server.status = batches, status
        print_message(f"getp: serving {config.model_name} at {_url(listener)}")
        asyncio.run(server.serve(sockets=[listener]))
    if thread.error is not None:
        raise GetpError(f"the engine failed: {thread.error}") from thread.error
    return 0


class _Server(uvicorn.Server):
    """Runs the application, until a signal requests a stop or the engine fails."""

    def __init__(self, app: Any, config: ServeConfig, service: Service, stop: GracefulStop) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=TimedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # errors are answers; unexpected ones are printed by the app
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=limits.MAX_HEADER_BYTES,
                limit_concurrency=limits.MAX_CONNECTIONS,
            )
        )
        self._service, self._stop, self._grace_s = service, stop, config.grace_s
        self.batches: Batches | None = None
        self.status: Status | None = None

    def capture_signals(self) -> AbstractContextManager[None]:
        """Leave signals to GracefulStop."""
        return nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        self._service.thread.mailbox.connect()
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop."""
        for each in (self.batches, self.status):
            if each is not None:
                each.tick()
        ended = self._service.thread.error is not None
        return await super().on_tick(counter) or self._stop.requested or ended

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests finish, for the time of grace, then end the rest."""
        thread, deadline = self._service.thread, time.monotonic() + self._grace_s
        self._service.stopping = True
        thread.stop(cancel=False)
        self.config.timeout_graceful_shutdown = self._grace_s
        await super().shutdown(sockets)
        while not thread.ended.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        thread.stop(cancel=True)
        await asyncio.to_thread(thread.ended.wait, _END_S)
        if self.batches is not None:
            await asyncio.to_thread(self.batches.close)


def _listen(config: ServeConfig) -> socket.socket:
    """Return the listening socket. Raises UsageProblem, GetpError."""
    if not _is_loopback(config.host) and config.api_key is None and not config.insecure:
        raise UsageProblem(
            "{host} {address} can be reached by other machines: give {api_key}, or {insecure} to "
            "let everybody use this server",
            address=config.host,
        )
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise GetpError(
            "cannot listen on {address}, port {number}: {reason}; give another {port} or {host}",
            address=config.host,
            number=config.port,
            reason=error.strerror or error,
        ) from error
    listener.setblocking(False)
    return listener


def _is_loopback(host: str) -> bool:
    """Return whether only programs on this machine reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _allow_many_connections() -> None:
    """Raise the limit on open files as far as this process may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * limits.MAX_CONNECTIONS
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
