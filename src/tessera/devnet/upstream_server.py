"""A model that runs elsewhere: the gateway, with its keys, prices and limits, in front of other servers' URLs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from tessera.core.clock import Clock
from tessera.devnet.http import bind_port, listening
from tessera.devnet.model_till import Access, open_model_till
from tessera.serving.callers import CallerLimits
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.upstreams.upstream import Target, Upstream, UpstreamConfig
from tessera.training.home import Home

__all__ = ["UpstreamServed", "serve_upstream"]


@dataclass(frozen=True, slots=True)
class UpstreamServed:
    """A model that answers, if its upstream does."""

    url: str
    name: str
    first_key: str  # an API key that was made just now; shown once


@asynccontextmanager
async def serve_upstream(
    home: Home,
    name: str,
    targets: Sequence[Target],
    context: int,
    clock: Clock,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    access: Access | None = None,
    concurrent: int = 100,
    callers: CallerLimits | None = None,
) -> AsyncIterator[UpstreamServed]:
    """Serve the upstream's model as `name` inside the block.

    Args:
        context: most tokens of a request, prompt and completion together; a price is for so many.

    Raises: Invalid: a URL that is none, free and paid at once; Conflict: the port is taken; Unavailable: the chain does
        not answer. Whether the upstream answers shows at the first request.
    """
    access = access or Access()
    async with AsyncExitStack() as stack:
        config = UpstreamConfig(context=context, max_tokens=context, max_connections=concurrent)
        upstream = Upstream(name, targets, config, clock=clock)
        stack.push_async_callback(upstream.aclose)
        till = await stack.enter_async_context(open_model_till(home, access, context, clock))
        limit = GatewayConfig(
            max_concurrent=concurrent, callers=callers or CallerLimits(), public_url=access.public_url
        )
        app = create_app(limit, [upstream], till.ways, clock=clock)
        till.mount(app)
        server_socket = bind_port(host, port)
        stack.callback(server_socket.close)
        url = await stack.enter_async_context(listening(app, server_socket))
        yield UpstreamServed(url, name, till.first_key)
