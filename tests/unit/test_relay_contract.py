"""Everything that a transport promises, once more between peers that have nothing but a relay."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import pytest
import test_p2p_contract

from p2p_world import Doomed, key, serve_all
from relay_world import ask, far_peer_process, url_of
from tessera.core.errors import Unavailable
from tessera.core.signing import PeerKey
from tessera.p2p.iroh_transport import IrohTransport
from tessera.p2p.relay.measure import deafen
from tessera.p2p.relay.server import Relay, RelayConfig
from tessera.p2p.transport import Transport

pytestmark = pytest.mark.slow


def is_contract(item: object) -> bool:
    marks = getattr(item, "pytestmark", [])
    return inspect.isfunction(item) and any("world_class" in mark.args for mark in marks)


CONTRACTS = dict(inspect.getmembers(test_p2p_contract, is_contract))
ELSEWHERE = "test_a_peer_that_restarts_elsewhere_is_found_by_its_new_record"  # behind a relay, nowhere is elsewhere


class RelayWorld:
    name = "relay"
    silence_s = 1.0
    relay: Relay

    def run(self, contract: Callable[..., Awaitable[None]]) -> None:
        async def main() -> None:
            async with Relay.start(RelayConfig(sight=False)) as self.relay:
                await contract(self)

        anyio.run(main)

    @asynccontextmanager
    async def start(self, peer: PeerKey) -> AsyncIterator[Transport]:
        async with IrohTransport.start(peer, relays=(url_of(self.relay),), direct=False) as transport:
            deafen(transport)
            assert await transport.online(10)
            yield transport

    def dead_address(self) -> str:
        return f"relay:{self.relay.url}"

    def doomed(self, peer: PeerKey) -> AbstractAsyncContextManager[Doomed]:
        return far_peer_process(self.relay, peer.seed[0])


@pytest.mark.parametrize("name", sorted(CONTRACTS.keys() - {ELSEWHERE}))
def test_the_promise_holds_through_a_relay(name: str) -> None:
    CONTRACTS[name](RelayWorld)


def test_a_peer_that_restarts_is_found_at_the_same_relay() -> None:
    """The record says the same as before, so only the old link's silence tells."""

    async def contract(world: RelayWorld) -> None:
        async with world.start(key(1)) as caller, world.doomed(key(2)) as doomed:
            await ask(caller, doomed.record)
            doomed.kill()
            async with world.start(key(2)) as reborn:
                serve_all(reborn)
                with anyio.fail_after(8):
                    while True:
                        try:
                            assert await ask(caller, reborn.record(), b"again", timeout_s=5) == b"again"
                            return
                        except Unavailable:
                            await anyio.sleep(0.1)

    RelayWorld().run(contract)


def test_all_promises_were_found() -> None:
    assert ELSEWHERE in CONTRACTS
    assert len(CONTRACTS) > 20
