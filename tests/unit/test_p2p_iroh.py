"""What only the iroh adapter has to get right."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest

from p2p_world import LIMIT, IrohWorld, key, serve_all
from tessera.core.errors import Invalid, Unavailable
from tessera.core.signing import PeerKey
from tessera.p2p import iroh_transport
from tessera.p2p.calls import call
from tessera.p2p.iroh_link import IrohChannel
from tessera.p2p.iroh_transport import IrohTransport
from tessera.p2p.transport import PeerRecord, Stream

pytestmark = pytest.mark.anyio


async def ask(caller: IrohTransport, peer: PeerRecord, body: bytes = b"") -> bytes:
    _, back = await call(caller, peer, "answer/1", {}, body, timeout_s=10, reply_limit=LIMIT)
    return back


def finish_late(monkeypatch: pytest.MonkeyPatch, who: PeerKey) -> None:
    """From now on, `who` ends its streams in a packet well after its last message; the other of the two does not."""
    finish, others = IrohChannel.finish, {key(1).id, key(2).id} - {who.id}

    async def late(self: IrohChannel) -> None:
        if self._peer in others:
            await anyio.sleep(0.004)
        await finish(self)

    monkeypatch.setattr(IrohChannel, "finish", late)


async def test_the_peers_key_is_the_engines_key() -> None:
    me = PeerKey.generate()
    async with IrohTransport.start(me) as transport:
        assert str(transport._endpoint.id()) == me.id == transport.id == transport.record().id
        assert transport.record().addrs[0].startswith("iroh:127.0.0.1:")


async def test_listening_everywhere_names_addresses_that_can_be_dialled() -> None:
    async with IrohTransport.start(key(1), bind="0.0.0.0:0") as server, IrohTransport.start(key(2)) as caller:
        serve_all(server)
        addrs = server.record().rests("iroh")
        assert addrs[0].startswith("127.0.0.1:")
        assert not any(addr.startswith(("0.0.0.0", "[::]")) for addr in addrs)
        assert await ask(caller, server.record(), b"fine") == b"fine"


async def test_one_malformed_address_does_not_spoil_the_others() -> None:
    async with IrohTransport.start(key(1)) as server, IrohTransport.start(key(2)) as caller:
        serve_all(server)
        bad = (
            "iroh:example.com:1",
            "iroh:1.2.3.4:99999",
            "iroh:[::1",
            "iroh:::1:5",
            "iroh:[1.2.3.4]:5",
        )
        mixed = PeerRecord.sign(key(1), (*bad, *server.record().addrs), expires=2**40)
        assert await ask(caller, mixed, b"fine") == b"fine"
        with pytest.raises(Invalid, match="address"):
            await caller.open(PeerRecord.sign(key(9), bad, expires=0), "echo/1", timeout_s=1)


@pytest.mark.parametrize("bind", ["nonsense", "1.2.3.4", "127.0.0.1:99999", "localhost:0"])
async def test_an_address_that_makes_no_sense_cannot_be_bound(bind: str) -> None:
    with pytest.raises((Invalid, Unavailable), match="cannot listen"):
        async with IrohTransport.start(key(1), bind=bind):
            pass


async def test_a_port_in_use_is_named() -> None:
    async with IrohTransport.start(key(1)) as first:
        bind = first.record().rests("iroh")[0]
        with pytest.raises(Unavailable, match=bind):
            async with IrohTransport.start(key(2), bind=bind):
                pass


async def test_ends_that_come_late_do_not_use_up_a_links_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a reply often comes in a packet after the reply; nobody may take offence at that."""
    finish_late(monkeypatch, key(1))
    async with IrohTransport.start(key(1)) as server, IrohTransport.start(key(2)) as caller:
        serve_all(server)
        for _ in range(300):
            assert await ask(caller, server.record(), b"x") == b"x"


async def test_callers_that_hang_up_early_do_not_use_up_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    finish_late(monkeypatch, key(1))
    async with IrohTransport.start(key(1)) as server, IrohTransport.start(key(2)) as caller:

        async def say(stream: Stream) -> None:
            await stream.send(b"x", last=True)

        server.serve("say/1", say)
        for _ in range(300):
            stream = await caller.open(server.record(), "say/1", timeout_s=5, confirm=False)
            raw = cast(Any, stream)
            await stream.send(b"ask")
            await raw._channel.read(100)  # the answer is here, its end is not
            await stream.abort()


@pytest.mark.slow
async def test_a_peer_whose_python_is_busy_is_not_taken_for_dead() -> None:
    """The engine's threads answer for it; only deadlines end a wait for it."""
    async with IrohTransport.start(key(1)) as caller, IrohWorld().doomed(key(2)) as doomed:
        stream = await caller.open(doomed.record, "echo/1", timeout_s=10)
        await call(caller, doomed.record, "block/1", {"seconds": 4.5}, timeout_s=20, reply_limit=LIMIT)
        await stream.send(b"still there")
        assert await stream.recv(LIMIT) == b"still there"


@pytest.mark.slow
async def test_our_own_pause_does_not_count_as_the_peers_silence() -> None:
    async with IrohTransport.start(key(1)) as caller, IrohWorld().doomed(key(2)) as doomed:
        stream = await caller.open(doomed.record, "echo/1", timeout_s=10)
        time.sleep(4)  # noqa: ASYNC251 - the loop stands still, as it does while a large module is imported
        await anyio.sleep(1)
        await stream.send(b"still there")
        assert await stream.recv(LIMIT) == b"still there"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
async def test_a_frozen_peer_is_taken_for_dead() -> None:
    async with IrohTransport.start(key(1)) as caller, IrohWorld().doomed(key(2)) as doomed:
        stream = await caller.open(doomed.record, "echo/1", timeout_s=10)
        os.kill(doomed.pid, signal.SIGSTOP)
        try:
            started = anyio.current_time()
            with pytest.raises(Unavailable):
                await stream.recv(LIMIT)
            assert 2.5 < anyio.current_time() - started < 4.5
        finally:
            os.kill(doomed.pid, signal.SIGCONT)


async def test_a_closed_transport_leaves_no_task_behind() -> None:
    before = asyncio.all_tasks()
    async with IrohTransport.start(key(1)) as server, IrohTransport.start(key(2)) as caller:
        serve_all(server)
        streams: list[Any] = [await caller.open(server.record(), "echo/1", timeout_s=5) for _ in range(5)]
        for stream in streams:
            with anyio.move_on_after(0.01):
                await stream.recv(LIMIT)  # the read goes on without us
    await anyio.lowlevel.checkpoint()
    assert asyncio.all_tasks() - before == set()


async def test_when_many_shake_hands_a_peer_proves_its_address_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iroh_transport, "BUSY", 0)
    async with IrohTransport.start(key(1)) as server, IrohTransport.start(key(2)) as caller:
        serve_all(server)
        assert await ask(caller, server.record(), b"fine") == b"fine"


async def test_a_full_node_refuses_links_and_keeps_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        IrohTransport.start(key(1)) as server,
        IrohTransport.start(key(2)) as first,
        IrohTransport.start(key(3)) as second,
    ):
        serve_all(server)
        await ask(first, server.record())
        monkeypatch.setattr(iroh_transport, "MAX_LINKS", 1)
        with pytest.raises(Unavailable, match="does not answer"):
            await second.open(server.record(), "echo/1", timeout_s=10)
        assert await ask(first, server.record(), b"fine") == b"fine"
