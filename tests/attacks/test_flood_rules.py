"""Members and strangers that break a flood's rules: what they send is refused, who did it is dropped.

Nobody but the guilty is ever dropped, and what a victim holds stays within its bounds.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest

from flood_attackers import Liar, ask, garbage, malformed, send_raw, try_ask
from flood_world import GROUP, FloodWorld, payloads
from p2p_world import key
from tessera.core.errors import Invalid, Refused
from tessera.core.ids import PeerId
from tessera.p2p.flood import Flood, FloodConfig
from tessera.p2p.flood_index import CUT, FEW, HIGHEST, LIST, LOWEST, PARTS, SlotIndex
from tessera.p2p.flood_item import ID_BYTES, SLOT_BYTES, Item, check_equivocation, join_items, prove_equivocation
from tessera.p2p.flood_peers import PeerLimits
from tessera.p2p.flood_state import StateLimits
from tessera.p2p.memory import VirtualClock, run_virtual
from tessera.p2p.transport import PeerRecord

ATTACKER = key(66)
EVERYTHING = LOWEST + HIGHEST + bytes(16)
TIGHT = FloodConfig(
    state=StateLimits(origin_items=20, origin_bytes=40_000, seen=100),
    peers=PeerLimits(calls=50.0, calls_per_s=5.0, news_bytes=40_000.0, news_bytes_per_s=100.0),
)


@asynccontextmanager
async def attacked(config: FloodConfig = TIGHT) -> AsyncIterator[tuple[FloodWorld, Flood, Flood, Liar]]:
    """A victim, its friend, and a member that lies. At the end the honest two still talk, and nobody is framed."""
    world = FloodWorld(config=config)
    async with world.network.start(ATTACKER) as transport:
        liar = Liar(transport, ATTACKER, GROUP)
        world.records[ATTACKER.id] = transport.record()
        async with world.member(1) as victim, world.member(2) as friend:
            await anyio.sleep(5)
            yield world, victim, friend, liar
            friend.publish("end", b"still here")
            await anyio.sleep(60)
            assert payloads(victim, "end") == [b"still here"]
            assert world.guilty() <= {ATTACKER.id}


def victim_of(world: FloodWorld) -> PeerRecord:
    return world.records[key(1).id]


Attack = Callable[[FloodWorld, Flood, Liar], Awaitable[None]]


def is_barred(attack: Attack) -> None:
    """The attack ends with the attacker refused, at first for a while only."""

    async def main() -> None:
        async with attacked() as (world, victim, _, liar):
            await attack(world, victim, liar)
            await anyio.sleep(30)
            assert world.guilty() == {ATTACKER.id}
            assert await try_ask(liar.transport, victim_of(world), GROUP, "compare", EVERYTHING) == "barred"
            liar.lie = lambda question: bytes(len(question) // 96)  # it has learned
            await anyio.sleep(TIGHT.peers.bar_s + 30)
            assert await try_ask(liar.transport, victim_of(world), GROUP, "compare", EVERYTHING) == "ok"

    run_virtual(main)


# --- items ----------------------------------------------------------------------------------------------------------


def test_an_item_with_a_forged_signature_bars_whoever_gave_it_and_reaches_nobody() -> None:
    async def attack(world: FloodWorld, victim: Flood, liar: Liar) -> None:
        own = liar.item(1, b"fine")
        forged = Item(GROUP, "news", key(2).id, 7, "", own.expires, b"I owe you", own.signature)
        liar.items[forged.id] = forged
        await liar.offer(victim_of(world), forged.id)
        await anyio.sleep(1)
        assert payloads(victim) == []

    is_barred(attack)


def test_a_payload_that_was_changed_on_the_way_bars_whoever_gave_it() -> None:
    async def attack(world: FloodWorld, victim: Flood, liar: Liar) -> None:
        item = liar.item(1, b"one coin")
        liar.mutate = lambda body: body[:-4] + b"gold"
        await liar.offer(victim_of(world), item.id)
        await anyio.sleep(1)
        assert payloads(victim) == []

    is_barred(attack)


def test_items_that_nobody_asked_for_are_not_taken() -> None:
    async def attack(world: FloodWorld, victim: Flood, liar: Liar) -> None:
        item, other = liar.item(1, b"asked"), liar.item(2, b"not asked")
        liar.mutate = lambda body: join_items([item, other])
        await liar.offer(victim_of(world), item.id)
        await anyio.sleep(1)
        assert payloads(victim) == []

    is_barred(attack)


def test_an_oversize_answer_ends_in_a_bar_before_it_is_held() -> None:
    async def attack(world: FloodWorld, victim: Flood, liar: Liar) -> None:
        item = liar.item(1, b"x")
        liar.mutate = lambda body: bytes(4 << 20)
        await liar.offer(victim_of(world), item.id)
        await anyio.sleep(1)

    is_barred(attack)


def test_items_by_strangers_are_never_fetched() -> None:
    async def main() -> None:
        async with attacked() as (world, victim, friend, liar):
            stranger = Item(GROUP, "news", key(99).id, 1, "", int(VirtualClock().time()) + 999, b"hi")
            item = stranger.signed_by(key(99))
            liar.items[item.id] = item
            assert await liar.offer(victim_of(world), item.id) == "ok"
            await anyio.sleep(60)
            assert liar.asked == []
            assert payloads(victim) == payloads(friend) == []

    run_virtual(main)


def test_a_stranger_is_answered_nothing() -> None:
    async def main() -> None:
        async with attacked() as (world, _, _, _), world.network.start(key(99)) as stranger:
            for op in ("compare", "get", "offer"):
                with pytest.raises(Refused) as refused:
                    await ask(stranger, victim_of(world), GROUP, op, EVERYTHING)
                assert refused.value.rule == "member"

    run_virtual(main)


def test_expired_and_distant_items_are_not_taken_and_not_asked_for_again() -> None:
    async def main() -> None:
        async with attacked() as (world, victim, _, liar):
            old, distant = liar.item(1, b"old", ttl_s=-5), liar.item(2, b"for ever", ttl_s=1e9)
            for _ in range(5):
                assert await liar.offer(victim_of(world), old.id, distant.id) == "ok"
                await anyio.sleep(1)
            assert sorted(liar.asked) == sorted([old.id, distant.id])
            assert payloads(victim) == []

    run_virtual(main)


def test_replayed_items_are_fetched_once() -> None:
    """Old news, offered again and again, costs an offer each; what was replaced does not come back."""

    async def main() -> None:
        async with attacked() as (world, victim, _, liar):
            first, second = liar.item(1, b"first", key="me"), liar.item(2, b"second", key="me")
            for _ in range(10):
                assert await liar.offer(victim_of(world), first.id, second.id) == "ok"
                await anyio.sleep(1)
            assert payloads(victim) == [b"second"]
            assert len(liar.asked) == 2

    run_virtual(main)


def test_an_item_of_one_group_is_not_one_of_another() -> None:
    async def attack(world: FloodWorld, victim: Flood, liar: Liar) -> None:
        expires = int(VirtualClock().time()) + 999
        foreign = Item("another run", "news", ATTACKER.id, 1, "", expires, b"vote").signed_by(ATTACKER)
        replay = Item(GROUP, "news", ATTACKER.id, 1, "", expires, b"vote", foreign.signature)
        liar.items[replay.id] = replay
        await liar.offer(victim_of(world), replay.id)
        await anyio.sleep(1)
        assert payloads(victim) == []

    is_barred(attack)


# --- equivocation ---------------------------------------------------------------------------------------------------


def test_two_stories_in_one_slot_are_void_for_all_and_proven() -> None:
    async def main() -> None:
        async with attacked() as (world, victim, friend, liar):
            for number, target in ((0, key(1).id), (1, key(2).id)):
                twin = liar.item(5, b"story %d" % number, topic="votes")
                assert await liar.offer(world.records[target], twin.id) == "ok"
            honest = liar.item(6, b"the same for all", topic="votes")
            assert await liar.offer(victim_of(world), honest.id) == "ok"
            await anyio.sleep(60)
            assert payloads(victim, "votes") == payloads(friend, "votes") == [b"the same for all"]
            assert {check_equivocation(fault.evidence) for fault in world.faults} == {ATTACKER.id}
            assert len(world.faults) == 2  # each of the two told its application once
            third = liar.item(5, b"story 3", topic="votes")
            await liar.offer(victim_of(world), third.id)
            await anyio.sleep(60)
            assert third.id not in liar.asked

    run_virtual(main)


def test_evidence_that_proves_nothing_is_refused() -> None:
    expires = 2_000_000_000
    first, second = (Item(GROUP, "news", key(1).id, n, "", expires, b"x").signed_by(key(1)) for n in (1, 2))
    again = Item(GROUP, "news", key(1).id, 1, "", expires, b"x").signed_by(key(1))
    twin = Item(GROUP, "news", key(1).id, 1, "", expires, b"y").signed_by(key(1))
    unsigned = Item(GROUP, "news", key(1).id, 1, "", expires, b"z", bytes(64))
    assert check_equivocation(prove_equivocation(first, twin).evidence) == key(1).id
    for a, b in ((first, second), (first, again), (first, unsigned)):
        with pytest.raises(Invalid):
            check_equivocation(prove_equivocation(a, b).evidence)
    good = prove_equivocation(first, twin).evidence
    for bad in (None, {}, {**good, "group": "another run"}, {**good, "first": "zz"}, {**good, "second": 7},
                {**good, "first": "00" * 40_000}):  # fmt: skip
        with pytest.raises(Invalid):
            check_equivocation(bad)


# --- floods -----------------------------------------------------------------------------------------------------------


def test_a_member_that_calls_too_often_is_throttled_and_then_dropped() -> None:
    async def attack(world: FloodWorld, victim: Flood, liar: Liar) -> None:
        outcomes = [await try_ask(liar.transport, victim_of(world), GROUP, "compare", EVERYTHING) for _ in range(200)]
        order = list(dict.fromkeys(outcomes))
        assert order == ["ok", "unavailable", "barred"]
        assert outcomes.count("ok") < 120

    is_barred(attack)


def test_a_member_that_says_too_much_loses_only_its_own_words() -> None:
    """5,000 items, all in order: the victim keeps an origin's allowance, and fetches no faster than it refills."""

    async def main() -> None:
        async with attacked() as (world, victim, friend, liar):
            friend.publish("news", b"small and true")
            items = [liar.item(n, bytes(500), topic="spam", ttl_s=86_400) for n in range(1, 5_001)]
            for start in range(0, len(items), 500):
                await liar.offer(victim_of(world), *(item.id for item in items[start : start + 500]))
                await anyio.sleep(3)
                counts = victim.counts()
                assert counts.items <= TIGHT.state.origin_items + 2
                assert counts.size_bytes <= TIGHT.state.origin_bytes + 5000
                assert counts.wanted <= 1024
                assert len(world.stores[key(1).id]) == counts.items
            assert len(liar.asked) < 2000
            assert payloads(friend) == payloads(victim) == [b"small and true"]

    run_virtual(main)


def test_offers_of_what_does_not_exist_cost_the_liar_its_place() -> None:
    async def attack(world: FloodWorld, victim: Flood, liar: Liar) -> None:
        rng = random.Random(1)
        for _ in range(10):
            fake = [bytes.fromhex(key(2).id) + rng.randbytes(ID_BYTES - 32) for _ in range(400)]
            await liar.offer(victim_of(world), *fake)
            await anyio.sleep(1)
        assert victim.counts().wanted == 0

    is_barred(attack)


def test_who_stalls_a_fetch_delays_an_item_and_does_not_stop_it() -> None:
    async def main() -> None:
        async with attacked() as (world, victim, friend, liar):

            async def stall(peer: PeerId, request: object, body: bytes) -> tuple[dict[str, object], bytes]:
                await anyio.sleep_forever()
                raise AssertionError

            liar._answer = stall  # type: ignore[method-assign, assignment]
            Liar.__init__(liar, liar.transport, ATTACKER, GROUP)
            item = friend.publish("news", b"late but there")
            await liar.offer(victim_of(world), item.id)  # before the friend does
            await anyio.sleep(1)
            assert payloads(victim) == []
            await anyio.sleep(TIGHT.call_s)
            assert payloads(victim) == [b"late but there"]

    run_virtual(main)


# --- lies in comparisons --------------------------------------------------------------------------------------------


def _row(kind: int, *rows: bytes) -> bytes:
    return bytes([kind]) + len(rows).to_bytes(2, "big") + b"".join(rows)


def _range(low: bytes, high: bytes) -> bytes:
    return low + high + b"\x07" * 16


MIDDLE = b"\x80" + bytes(SLOT_BYTES - 1)
LIES = {
    "nothing at all": lambda question: b"",
    "another kind": lambda question: b"\x09",
    "more than was asked": lambda question: bytes(2),
    "a list that is not in order": lambda question: _row(LIST, b"\x02" * ID_BYTES, b"\x01" * ID_BYTES),
    "a list beyond its range": lambda question: _row(LIST, b"\xff" * ID_BYTES),
    "too long a list": lambda question: _row(LIST, *(n.to_bytes(ID_BYTES, "big") for n in range(FEW + 1))),
    "a range that is cut into itself": lambda question: _row(CUT, _range(LOWEST, HIGHEST)),
    "ranges with a gap": lambda question: _row(CUT, _range(LOWEST, MIDDLE), _range(HIGHEST[:-1] + b"\xfe", HIGHEST)),
    "ranges upside down": lambda question: _row(CUT, _range(MIDDLE, LOWEST), _range(LOWEST, HIGHEST)),
    "too many ranges": lambda question: _row(CUT, *(_range(LOWEST, HIGHEST) for _ in range(PARTS + 1))),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=[name.replace(" ", "_") for name in LIES])
def test_a_malformed_comparison_bars_the_liar(lie: Callable[[bytes], bytes]) -> None:
    async def main() -> None:
        async with attacked() as (world, _, _, liar):
            liar.lie = lie
            with anyio.fail_after(900):  # until somebody compares with it
                while not world.faults:
                    await anyio.sleep(10)
            assert world.guilty() == {ATTACKER.id}

    run_virtual(main)


@pytest.mark.slow
def test_endless_differences_end() -> None:
    """Each range that the victim asks about is cut in two that differ again: it gives up after a bounded effort."""
    asked = 0

    def cut_for_ever(question: bytes) -> bytes:
        nonlocal asked
        parts = []
        for start in range(0, len(question), 96):
            asked += 1
            low, high = question[start : start + SLOT_BYTES], question[start + SLOT_BYTES : start + 2 * SLOT_BYTES]
            middle = (int.from_bytes(low, "big") + int.from_bytes(high, "big")) // 2
            parts.append(_row(CUT, _range(low, middle.to_bytes(SLOT_BYTES, "big")),
                              _range(middle.to_bytes(SLOT_BYTES, "big"), high)))  # fmt: skip
        return b"".join(parts)

    async def main() -> None:
        async with attacked() as (_, victim, friend, liar):
            liar.lie = cut_for_ever
            await anyio.sleep(150)
            friend.publish("news", b"meanwhile")
            await anyio.sleep(5)
            assert payloads(victim) == [b"meanwhile"]

    run_virtual(main)
    assert 64 < asked < 150 / 15 * 2 * 64 * 64


@pytest.mark.slow
def test_claims_to_hold_what_it_does_not_cost_the_liar_its_place() -> None:
    rng = random.Random(2)

    def claim(question: bytes) -> bytes:
        low = question[:SLOT_BYTES]
        if low != LOWEST or len(question) != 96:
            return bytes(len(question) // 96)
        ids = sorted(bytes.fromhex(key(2).id) + rng.randbytes(ID_BYTES - 32) for _ in range(FEW))
        return _row(LIST, *ids)

    async def main() -> None:
        async with attacked() as (world, victim, _, liar):
            liar.lie = claim
            await anyio.sleep(7200)
            assert victim.counts().wanted == 0
            assert world.guilty() == {ATTACKER.id}

    run_virtual(main)


def test_a_liar_that_says_all_is_the_same_hides_nothing_for_long() -> None:
    async def main() -> None:
        async with attacked() as (world, victim, friend, _):
            world.network.partition(key(1).id, key(2).id)
            friend.publish("news", b"hidden?")
            await anyio.sleep(300)
            assert payloads(victim) == []  # the only other way is through the liar
            world.network.heal(key(1).id, key(2).id)
            await anyio.sleep(900)
            assert payloads(victim) == [b"hidden?"]

    run_virtual(main)


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_garbage_and_oversize_hellos_change_nothing() -> None:
    async def main() -> None:
        rng = random.Random(4)
        async with attacked() as (world, victim, _, liar):
            before = victim.counts()
            for data in garbage(GROUP, rng) * 3:
                await send_raw(liar.transport, victim_of(world), data)
            assert victim.counts() == before

    run_virtual(main)


def test_requests_that_make_no_sense_end_in_a_bar() -> None:
    async def attack(world: FloodWorld, victim: Flood, liar: Liar) -> None:
        for op, body in malformed(random.Random(5)):
            assert await try_ask(liar.transport, victim_of(world), GROUP, op, body) in ("invalid", "barred")

    is_barred(attack)


def test_slow_readers_hold_a_place_each_and_nobody_else_up() -> None:
    async def main() -> None:
        async with attacked() as (world, victim, friend, liar):
            for _ in range(15):
                friend.publish("news", bytes(1500))
            await anyio.sleep(5)
            ids = [item.id for item in victim.items("news")]
            world.network.slow(ATTACKER.id, 100.0)
            async with anyio.create_task_group() as tasks:
                for _ in range(30):
                    tasks.start_soon(try_ask, liar.transport, victim_of(world), GROUP, "get", b"".join(ids))
                await anyio.sleep(1)
                friend.publish("votes", b"now")
                await anyio.sleep(2)
                assert payloads(victim, "votes") == [b"now"]

    run_virtual(main)


def test_an_index_of_one_origin_and_no_member_is_empty() -> None:
    """The question a newcomer asks first has an answer of a few bytes."""
    index = SlotIndex()
    assert len(index) == 0
    assert index.fingerprint() == SlotIndex().fingerprint()
