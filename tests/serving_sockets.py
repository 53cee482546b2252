"""An app behind the product's own HTTP server, on a socket of this process, for tests."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import uvicorn

from tessera.serving.server import ServerLimits, server_config


@asynccontextmanager
async def listening(app: Any, limits: ServerLimits | None = None) -> AsyncIterator[str]:
    """Yields the URL."""
    server = uvicorn.Server(server_config(app, limits, log_config=None))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        async with anyio.create_task_group() as group:
            group.start_soon(server.serve, [listener])
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True
