"""Reaching one of several peers who would all do: those who failed lately are asked last.

Invariants: every try has a deadline; what is remembered of peers is bounded and fades.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

from tessera.core.errors import Late, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.serving.decoding.links import PROTOCOL, Limits, Link, Record, Transport

__all__ = ["Dialler"]

BLAME_S = 30.0
BLAMED = 1_024  # peers remembered
T = TypeVar("T")


class Dialler:
    """Opens decode streams. `limits` hold for what comes back on them."""

    def __init__(self, transport: Transport, limits: Limits) -> None:
        self._transport = transport
        self._limits = limits
        self._blamed: dict[PeerId, float] = {}  # until when

    async def reach(
        self, holders: Sequence[Record], greet: Callable[[Link], Awaitable[T]], *, timeout_s: float
    ) -> tuple[Link, T]:
        """A stream to the first of `holders` who lets itself be greeted, and what `greet` got from it.

        Raises: what the last one of them said.
        """
        failure: TesseraError = Unavailable("nobody holds this stage")
        now = anyio.current_time()
        for record in sorted(holders, key=lambda holder: self._blamed.get(holder.id, 0.0) > now):  # else in their order
            try:
                share_s = timeout_s / len(holders)
                link = Link(
                    await self._transport.open(record, PROTOCOL, timeout_s=share_s, confirm=False), self._limits
                )
            except (Unavailable, Late) as error:
                self.blame(record.id)
                failure = error
                continue
            try:
                return link, await greet(link)
            except (Unavailable, Late) as error:
                await link.close(error)
                failure = error
            except BaseException:
                await link.abort()
                raise
        raise failure

    def blame(self, peer: PeerId) -> None:
        """Ask this one last for a while."""
        now = anyio.current_time()
        self._blamed = {known: until for known, until in self._blamed.items() if until > now}
        if len(self._blamed) < BLAMED:
            self._blamed[peer] = now + BLAME_S
