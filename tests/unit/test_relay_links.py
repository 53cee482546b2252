"""Peers that meet at a relay: everything that links promise holds there too."""

from __future__ import annotations

import math
import time
from contextlib import AsyncExitStack

import anyio
import pytest

from p2p_world import key, serve_all
from relay_world import TOKEN, ask, big, far_peer_process, far_peers, paths, relay_bytes, url_of
from tessera.core.errors import Invalid, Late, Refused, Unavailable
from tessera.p2p.iroh_transport import IrohTransport
from tessera.p2p.relay.engine import keep_home
from tessera.p2p.relay.measure import measure_links
from tessera.p2p.relay.probe import probe_relay
from tessera.p2p.relay.server import Relay, RelayConfig
from tessera.p2p.relay.sight import nat_kind, relay_facts
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.transport import PeerRecord

pytestmark = pytest.mark.anyio
BLIND = RelayConfig(sight=False)


async def test_two_peers_that_cannot_reach_each_other_exchange_calls_and_large_messages() -> None:
    data = bytes(range(256)) * (8 << 12)
    async with Relay.start(RelayConfig(tokens=(TOKEN,))) as relay, far_peers(url_of(relay, TOKEN)) as (one, two):
        assert one.record().addrs == two.record().addrs == (f"relay:{relay.url}",)
        assert TOKEN not in one.record().to_text()
        assert sorted(relay.clients) == sorted((one.id, two.id))
        assert await ask(one, two.record(), b"hello") == b"hello"
        assert await ask(two, one.record(), b"back") == b"back"
        assert await big(one, two.record(), data) == data
        assert relay_bytes(two) > len(data), "the message came through the relay"


async def test_many_calls_at_once_go_through_a_relay() -> None:
    async with Relay.start(BLIND) as relay, far_peers(url_of(relay)) as (one, two):
        answers = set()

        async def one_call(number: int) -> None:
            answers.add(await ask(one, two.record(), str(number).encode() * 4000))

        async with anyio.create_task_group() as calls:
            for number in range(60):
                calls.start_soon(one_call, number)
        assert answers == {str(number).encode() * 4000 for number in range(60)}


async def test_a_direct_path_is_taken_where_one_works() -> None:
    async with Relay.start(BLIND) as relay:
        relays = (url_of(relay),)
        start = IrohTransport.start
        async with start(key(1), relays=relays) as one, start(key(2), relays=relays) as two:
            serve_all(two)
            assert await one.online(10)
            assert await two.online(10)
            only_relay = PeerRecord.sign(key(2), (f"relay:{relay.url}",), expires=2**40)
            await ask(one, only_relay)
            with anyio.fail_after(10):
                while not any(path.is_ip and path.is_selected for path in paths(one)):
                    await ask(one, only_relay)
                    await anyio.sleep(0.02)


@pytest.mark.slow
async def test_a_peer_that_falls_silent_behind_a_relay_is_noticed_within_seconds() -> None:
    async with Relay.start(BLIND) as relay, far_peers(url_of(relay), count=1) as (one,):
        async with far_peer_process(relay) as doomed:
            states = one.watch(doomed.record.id)
            assert await anext(states) == "down"
            await ask(one, doomed.record)
            assert await anext(states) == "up"
            doomed.kill()
            began = time.monotonic()
            with anyio.fail_after(5):
                assert await anext(states) == "down"
            assert 1.0 < time.monotonic() - began < 4.5


@pytest.mark.slow
async def test_a_relay_that_restarts_is_no_more_than_a_reconnect() -> None:
    async with AsyncExitStack() as old:
        relay = await old.enter_async_context(Relay.start(BLIND))
        async with far_peers(url_of(relay)) as (one, two):
            await ask(one, two.record())
            records = one.record(), two.record()
            await old.aclose()
            with pytest.raises((Unavailable, Late)):
                await ask(one, records[1], timeout_s=1)
            async with Relay.start(RelayConfig(port=relay.port, sight=False)) as again:
                with anyio.fail_after(12):
                    while set(again.clients) != {one.id, two.id}:
                        await anyio.sleep(0.02)
                assert await ask(one, records[1], b"after") == b"after"
                assert await ask(two, records[0], b"too") == b"too"


async def test_a_relay_that_starts_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.p2p.relay.engine.LOOK_AGAIN_S", 0.2)
    async with Relay.start(BLIND) as relay:
        port = relay.port
    late = RelayUrl(f"http://127.0.0.1:{port}")
    async with IrohTransport.start(key(1), relays=(late,)) as one:
        assert not await one.online(0.3)
        async with Relay.start(RelayConfig(port=port, sight=False)) as relay:
            assert await one.online(10)
            assert relay.clients == [one.id]


async def test_a_relay_that_is_not_ours_is_not_followed() -> None:
    async with (
        Relay.start(BLIND) as relay,
        IrohTransport.start(key(5)) as stranger,
        far_peers(url_of(relay), count=1) as (one,),
    ):
        with pytest.raises(Invalid, match="not among our relays"):
            await stranger.open(one.record(), "echo/1", timeout_s=2)
        lure = PeerRecord.sign(key(9), ("relay:http://192.0.2.1:80", "relay:nonsense"), expires=2**40)
        with pytest.raises(Invalid, match=r"192\.0\.2\.1"):
            await one.open(lure, "echo/1", timeout_s=2)


async def test_either_of_two_relays_will_do() -> None:
    async with Relay.start(BLIND) as first, Relay.start(BLIND) as other:
        relays = (url_of(first), url_of(other))
        async with far_peers(*relays) as (one, _):
            assert set(one.record().rests("relay")) == {first.url, other.url}
            named = PeerRecord.sign(key(2), (f"relay:{first.url}", f"relay:{other.url}"), expires=2**40)
            assert await ask(one, named, b"either") == b"either"


@pytest.mark.slow
async def test_when_its_relay_dies_a_node_moves_to_the_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.p2p.relay.engine.LOOK_AGAIN_S", 0.3)
    async with AsyncExitStack() as dying, Relay.start(BLIND) as other:
        first = await dying.enter_async_context(Relay.start(BLIND))
        async with far_peers(url_of(first)) as (one, two):
            for peer in (one, two):
                peer._relays = (url_of(first), url_of(other))
                peer._tasks.start_soon(keep_home, peer._endpoint, peer._relays)
            await dying.aclose()
            with anyio.fail_after(15):
                while set(other.clients) != {one.id, two.id}:
                    await anyio.sleep(0.05)
            assert two.record().rests("relay")[0] == other.url, "the one at which it listens comes first"
            with anyio.fail_after(10):
                while await echoed(one, two) != b"moved":
                    await anyio.sleep(0.1)


async def echoed(one: IrohTransport, two: IrohTransport) -> bytes:
    try:
        return await ask(one, two.record(), b"moved", timeout_s=4)
    except (Unavailable, Late):
        return b""


async def test_what_is_asked_of_a_transport_must_make_sense() -> None:
    with pytest.raises(Invalid, match="needs a relay"):
        async with IrohTransport.start(key(1), direct=False):
            pass
    twice = (RelayUrl("http://127.0.0.1:1"), RelayUrl("HTTP://127.0.0.1:1/"))
    with pytest.raises(Invalid, match="each once"):
        async with IrohTransport.start(key(1), relays=twice):
            pass


async def test_the_state_of_every_relay_is_told() -> None:
    async with Relay.start(RelayConfig(tokens=(TOKEN,), sight=False)) as relay:
        good, gone = url_of(relay, TOKEN), RelayUrl("http://127.0.0.1:9")
        async with IrohTransport.start(key(1), relays=(good, gone)) as one:
            assert await one.online(10)
            here, there = await one.relay_status()
        assert (here.url, here.home, here.problem) == (relay.url, True, "")
        assert 0 < here.round_trip_s < 1
        assert (there.home, there.round_trip_s) == (False, math.inf)
        assert "nobody answers" in there.problem


async def test_a_probe_says_what_is_wrong() -> None:
    async with Relay.start(RelayConfig(tokens=(TOKEN,))) as relay:
        assert (await probe_relay(relay.url, TOKEN)).version == 2
        with pytest.raises(Refused, match="token") as refused:
            await probe_relay(relay.url, "not-the-token")
        assert refused.value.fields["relay"] == relay.url
        facts = await relay_facts(url_of(relay))
        assert facts.token
        assert facts.seen.startswith("127.0.0.1:")
    with pytest.raises(Unavailable, match="nobody answers"):
        await probe_relay(relay.url, TOKEN)
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as silent:
        port = silent.extra(anyio.abc.SocketAttribute.local_port)
        with pytest.raises(Late, match=str(port)):
            await probe_relay(f"http://127.0.0.1:{port}", timeout_s=0.1)


async def test_without_a_router_in_between_no_nat_is_found() -> None:
    async with Relay.start(RelayConfig()) as relay:
        found = await nat_kind([url_of(relay), RelayUrl("http://127.0.0.1:9")])
        assert found.kind == "none"
        assert [sighting.relay for sighting in found.sightings] == [relay.url]
        assert len(found.problems) == 1
    assert (await nat_kind([RelayUrl("http://127.0.0.1:9")])).kind == "unknown"


async def test_a_node_on_all_interfaces_publishes_how_it_looks_from_outside() -> None:
    async with Relay.start(RelayConfig()) as relay:
        async with IrohTransport.start(key(1), bind="0.0.0.0:0", relays=(url_of(relay),)) as one:
            with anyio.fail_after(10):
                while not any(str(addr).startswith("127.") for addr in one._endpoint.addr().direct_addresses()):
                    await anyio.sleep(0.02)


async def test_loopback_means_loopback_for_both_families() -> None:
    async with IrohTransport.start(key(1)) as one:
        bound = [str(addr) for addr in one._endpoint.bound_sockets()]
        assert all(addr.startswith(("127.0.0.1:", "[::1]:")) for addr in bound)


async def test_the_measurement_gives_both_rates() -> None:
    speed = await measure_links(message_bytes=1 << 20, messages=2)
    assert speed.direct_mb_s > 1
    assert speed.relay_mb_s > 1
    assert 0 < speed.direct_rtt_s < speed.relay_rtt_s + 1
    assert speed.relay_cpu_share >= 0
