"""HTTP requests that leave the gateway: one POST, its answer as it comes.

aiohttp rather than httpx, which the rest uses: an upstream's stream is a chunk for each token, and httpx takes several
times the processor for one (see docs/log.md). Nothing is followed, decoded, kept or read from the environment.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

import aiohttp

from tessera.core.errors import Late, Unavailable

__all__ = ["HttpPoster", "HungUp", "Poster", "Reply"]


class HungUp(Unavailable):
    """The connection ended before a byte of the answer: perhaps one kept from before, which the server had closed."""


class Reply(Protocol):
    """An answer whose head is there."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Names compare without case."""
        ...

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes. Raises: Unavailable when it breaks; Late when it stalls."""
        ...

    def close(self) -> None:
        """The body is over, or nobody wants the rest. Safe to call twice."""
        ...


class Poster(Protocol):
    """Where requests leave."""

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """Raises: Unavailable when nobody answers; Late when nobody does in time."""
        ...

    async def aclose(self) -> None: ...


class HttpPoster:
    """Over sockets, with connections kept for the next request. Times in seconds.

    Args:
        byte_timeout_s: for the first byte of an answer, and between two.
        max_connections: more wait.
    """

    def __init__(self, *, connect_timeout_s: float, byte_timeout_s: float, max_connections: int) -> None:
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_s, sock_read=byte_timeout_s)
        self._max_connections = max_connections
        self._session: aiohttp.ClientSession | None = None

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """See `Poster.post`."""
        if self._session is None:  # in the event loop that it belongs to
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._max_connections),
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,  # neither a proxy nor a .netrc that nobody meant for this
            )
        try:
            response = await self._session.post(url, data=body, headers=headers, allow_redirects=False)
        except TimeoutError:
            raise Late("the upstream did not answer in time") from None
        except aiohttp.ServerDisconnectedError:
            raise HungUp("the upstream hung up") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"the upstream cannot be reached ({type(error).__name__})") from None
        return _HttpReply(response)

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()


class _HttpReply:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers = response.headers

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        content = self._response.content
        try:
            while chunk := await content.readany():
                yield chunk
        except TimeoutError:
            raise Late("the upstream was silent for too long") from None
        except (aiohttp.ClientError, OSError):
            raise Unavailable("the upstream broke off its answer") from None

    def close(self) -> None:
        self._response.close()
