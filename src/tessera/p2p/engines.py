"""Which engine carries a node's links: iroh between strangers, ZeroMQ inside a network that is one's own.

All members of a run use one engine; an invitation's addresses say which.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

from tessera.core.clock import Clock
from tessera.core.errors import Invalid
from tessera.core.signing import PeerKey
from tessera.p2p.iroh_transport import IrohTransport
from tessera.p2p.pacer import Pacer
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.transport import PeerRecord, Transport
from tessera.p2p.zmq_transport import ZmqTransport

__all__ = ["Engine", "engine_of", "start_transport"]

Engine = Literal["iroh", "zmq"]


@asynccontextmanager
async def start_transport(
    engine: Engine,
    key: PeerKey,
    *,
    bind: str,
    clock: Clock,
    pacer: Pacer | None = None,
    relays: Sequence[RelayUrl] = (),
    online_s: float = 0.0,
) -> AsyncIterator[Transport]:
    """A transport on `bind` until the body ends.

    Args:
        bind: address and port: UDP for iroh, TCP for zmq.
        online_s: how long to wait for a relay before the body begins; without one, the record says where it will be.

    Raises: Invalid, Unavailable as the engines do; Invalid for relays where there are none.
    """
    if engine == "zmq":
        if relays:
            raise Invalid("relays are iroh's: a network that is your own needs none, leave --relay out")
        async with ZmqTransport.start(key, bind=bind, clock=clock, pacer=pacer) as own:
            yield own
        return
    async with IrohTransport.start(key, bind=bind, clock=clock, pacer=pacer, relays=relays) as far:
        if relays and online_s:
            await far.online(online_s)
        yield far


def engine_of(peer: PeerRecord) -> Engine:
    """The engine that a peer can be reached with."""
    return "zmq" if peer.rests("zmq") and not peer.rests("iroh") and not peer.rests("relay") else "iroh"
