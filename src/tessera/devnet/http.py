"""ASGI apps on sockets of this process, beside everything else that its event loop does."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import uvicorn

from tessera.core.errors import Conflict, Invalid
from tessera.serving.server import server_config

__all__ = ["bind_port", "bind_ports", "listening"]


def bind_port(host: str, port: int) -> socket.socket:
    """A TCP socket bound to `host:port`. Raises `Conflict` when the port is in use, `Invalid` for a wrong address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise Invalid(f"cannot listen on {host!r}: {error}") from error
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
        server.listen(128)
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(f"port {port} on {host} is in use: stop what uses it, or give another --port") from error
        raise Invalid(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return server


@contextmanager
def bind_ports(host: str, port: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Sockets on `port` and the one above; both anywhere free when `port` is 0. Closed at the end of the block."""
    first = bind_port(host, port)
    try:
        second = bind_port(host, port + 1 if port else 0)
    except BaseException:
        first.close()
        raise
    try:
        yield first, second
    finally:
        first.close()
        second.close()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the command that started us owns Ctrl-C."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(app: Any, server_socket: socket.socket) -> AsyncIterator[str]:
    """Serve `app` on a bound socket inside the block; yields its URL."""
    server = _Server(server_config(app, log_level="warning", timeout_graceful_shutdown=1))
    host, port = server_socket.getsockname()[:2]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve, [server_socket])
        while not server.started:
            await anyio.sleep(0.01)
        try:
            yield f"http://{host}:{port}"
        finally:
            server.should_exit = True
