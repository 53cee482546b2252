"""A replica that sends the others what no honest one sends: it is named with proof, and nothing else suffers."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from exchange_world import LIMIT, RUN, SIZE, Replicas, honest, in_virtual_time, part, replicas
from p2p_world import key
from tessera.core.errors import Invalid, Late, Missing, Refused, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.p2p.calls import call, serve_calls
from tessera.training.exchange import PIECE
from tessera.training.exchange_part import PartHead, PartName, SignedPart
from tessera.training.protocols import AVERAGE, SMALL

Served = tuple[dict[str, Any], bytes]


def attack(world: Replicas, n: int, answer: Callable[[PartName, PeerId, int], Served]) -> None:
    """From now on replica `n` answers requests with `answer(name, owner, offset)`."""

    async def handle(peer: PeerId, request: dict[str, Any], body: bytes) -> Served:
        return answer(PartName.parse(request), request["owner"], request["offset"])

    serve_calls(world.transports[n], AVERAGE, handle, request_limit=SMALL)


def pieces(signed: SignedPart, offset: int) -> Served:
    return signed.head.to_value(), signed.data[offset : offset + PIECE]


async def offer_all(world: Replicas, but: int = -1) -> None:
    for n, exchange in enumerate(world.exchanges):
        if n != but:
            await exchange.offer(world.name(), part(n))


async def accused(world: Replicas, attacker: int) -> str:
    """What replica 0 collects is everything but the attacker's; returns why."""
    collected = await world.collect(0, 20)
    others = [peer for n, peer in enumerate(world.ids) if n != attacker]
    assert list(collected.parts) == others
    assert list(collected.faults) == [world.ids[attacker]]
    error = collected.faults[world.ids[attacker]]
    assert error.evidence["peer"] == world.ids[attacker]
    return error.message


@in_virtual_time
async def test_an_owner_whose_part_has_another_size_is_convicted_by_his_signature() -> None:
    for size in (0, 1, SIZE - 1, SIZE + 1, LIMIT):
        async with replicas(3) as world:
            await offer_all(world, but=2)
            await world.exchanges[2].offer(world.name(), part(2, size))
            assert f"{size} bytes, expected {SIZE}" in await accused(world, 2)


@in_virtual_time
async def test_an_owner_who_announces_a_gigabyte_costs_one_piece() -> None:
    async with replicas(3) as world:
        await offer_all(world, but=2)
        signed = SignedPart.sign(key(3), world.name(), bytes(LIMIT))
        huge = {**signed.head.to_value(), "size": 2**40}
        attack(world, 2, lambda name, owner, offset: (huge, bytes(PIECE)))
        assert "signature" in await accused(world, 2)


@in_virtual_time
async def test_an_owner_whose_part_holds_rubbish_is_convicted_by_his_signature() -> None:
    async with replicas(3) as world:
        await offer_all(world, but=2)
        await world.exchanges[2].offer(world.name(), part(255))
        assert "not finite" in await accused(world, 2)
        error = (await world.collect(1, 20)).faults[world.ids[2]]
        head = PartHead.parse(PeerId(error.evidence["peer"]), error.evidence["head"])
        head.check(PartName.parse(error.evidence["name"]))  # anybody can see that he signed it
        with pytest.raises(Invalid, match="signature"):
            head.check(world.name(1))


@in_virtual_time
async def test_who_serves_other_bytes_than_their_owner_signed_is_named_and_not_the_owner() -> None:
    """The owner is dead; the attacker has his head from before, the honest replica his part."""
    async with replicas(4) as world:
        await offer_all(world)
        await world.all_collect([2])
        true = SignedPart.sign(key(4), world.name(), part(3))
        false = SignedPart(true.head, part(66))
        attack(world, 1, lambda name, owner, offset: pieces(false, offset))
        world.network.kill(world.ids[3])
        collected = await world.collect(0, 20)
        assert collected.parts[world.ids[3]] == part(3)
        assert list(collected.faults) == [world.ids[1]]
        assert collected.faults[world.ids[1]].evidence["fault"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda head, body: (head, body[:-1]), "piece of"),
        (lambda head, body: (head, body + b"\0"), "piece of|reply of"),
        (lambda head, body: (head, b""), "piece of"),
        (lambda head, body: ({**head, "digest": "00" * 32}, body), "signature"),
        (lambda head, body: ({**head, "signature": "00" * 64}, body), "signature"),
        (lambda head, body: ({**head, "signature": "zz" * 64}, body), "in lower-case hex"),
        (lambda head, body: ({**head, "size": -1}, body), "number of bytes"),
        (lambda head, body: ({**head, "size": "big"}, body), "number of bytes"),
        (lambda head, body: ({**head, "more": 1}, body), "fields"),
        (lambda head, body: ({}, body), "fields"),
        (lambda head, body: (head, bytes(4 * PIECE)), "reply of|oversize|bytes"),
    ],
)
def test_a_reply_that_no_exchange_gives_names_its_sender(spoil: Callable[[Any, Any], Served], reason: str) -> None:
    @in_virtual_time
    async def check() -> None:
        async with replicas(3) as world:
            await offer_all(world, but=2)
            signed = SignedPart.sign(key(3), world.name(), part(2))
            attack(world, 2, lambda name, owner, offset: spoil(*pieces(signed, offset)))
            message = await accused(world, 2)
            assert any(word in message for word in reason.split("|")), message

    check()


@in_virtual_time
async def test_a_head_that_changes_between_pieces_names_its_sender() -> None:
    async with replicas(3) as world:
        await offer_all(world, but=2)
        both = [SignedPart.sign(key(3), world.name(), part(n)) for n in (2, 3)]
        attack(world, 2, lambda name, owner, offset: pieces(both[offset > 0], offset))
        assert "another head" in await accused(world, 2)


@in_virtual_time
async def test_a_replica_that_stalls_does_not_keep_us_from_asking_the_next() -> None:
    """The owner is dead, the first one asked in his place never answers, the second has the part."""
    async with replicas(4) as world:
        await offer_all(world)
        await world.all_collect([2])
        world.network.kill(world.ids[3])

        async def stall(peer: PeerId, request: dict[str, Any], body: bytes) -> Served:
            if request["owner"] == world.ids[3]:
                await anyio.sleep_forever()
            return pieces(SignedPart.sign(key(2), world.name(), part(1)), request["offset"])

        serve_calls(world.transports[1], AVERAGE, stall, request_limit=SMALL)
        collected = await world.collect(0, 20)
        assert list(collected.parts) == world.ids
        assert collected.faults == {}


@in_virtual_time
async def test_a_part_signed_for_another_step_is_no_part_of_this_one() -> None:
    async with replicas(3) as world:
        await offer_all(world, but=2)
        old = SignedPart.sign(key(3), world.name(7), part(2))
        attack(world, 2, lambda name, owner, offset: pieces(old, offset))
        assert "signature" in await accused(world, 2)


@in_virtual_time
async def test_an_accusation_against_somebody_else_falls_back_on_its_sender() -> None:
    async with replicas(3) as world:
        await offer_all(world, but=2)

        def accuse(name: PartName, owner: PeerId, offset: int) -> Served:
            raise TesseraError("x", peer=world.ids[1])

        attack(world, 2, accuse)
        collected = await world.collect(0, 20)
        assert list(collected.parts) == world.ids[:2]
        assert world.ids[1] not in collected.faults


@in_virtual_time
async def test_a_stranger_is_served_nothing() -> None:
    async with replicas(3) as world:
        await offer_all(world)
        del world.members[world.ids[2]]
        request = {**world.name().to_value(), "offset": 0, "owner": world.ids[0], "wait_ms": 0}
        with pytest.raises(Refused) as caught:
            await call(
                world.transports[2], world.transports[0].record(), AVERAGE, request, timeout_s=5, reply_limit=LIMIT
            )
        assert caught.value.rule == "average_members"
        own = [world.ids[0], world.ids[1]]
        found = await world.exchanges[0].collect(world.name(), [*own, world.ids[2]], 5, size_bytes=SIZE, check=honest)
        assert list(found.parts) == own, "and is not asked either"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"kind": "params"}, Invalid),
        ({"kind": 3}, Invalid),
        ({"number": -1}, Invalid),
        ({"number": 2**31}, Invalid),
        ({"number": True}, Invalid),
        ({"number": 1.5}, Invalid),
        ({"attempt": None}, Invalid),
        ({"run_id": "cd" * 32}, Invalid),
        ({"run_id": [RUN]}, Invalid),
        ({"owner": "me"}, Invalid),
        ({"owner": None}, Invalid),
        ({"offset": -1}, Invalid),
        ({"offset": SIZE + 1}, Invalid),
        ({"offset": "0"}, Invalid),
        ({"wait_ms": -1}, Invalid),
        ({"wait_ms": 0.5}, Invalid),
        ({"number": 5}, Unavailable),
        ({"owner": "00" * 32}, Unavailable),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(change: dict[str, Any], error: type[TesseraError]) -> None:
    @in_virtual_time
    async def check() -> None:
        async with replicas(2) as world:
            await offer_all(world)
            request = {**world.name().to_value(), "offset": 0, "owner": world.ids[0], "wait_ms": 0, **change}
            with pytest.raises(error):
                await call(
                    world.transports[1], world.transports[0].record(), AVERAGE, request, timeout_s=5, reply_limit=LIMIT
                )
            assert (await world.collect(1, 10)).parts.keys() == set(world.ids)

    check()


@in_virtual_time
async def test_names_that_nobody_offered_fill_no_memory() -> None:
    """Requests leave nothing behind, however long they say that they will wait."""
    async with replicas(2) as world:
        await offer_all(world)
        for number in range(1, 300):
            request = {**world.name(number).to_value(), "offset": 0, "owner": world.ids[0], "wait_ms": 10**9}
            with pytest.raises((Late, Unavailable, Missing)):
                await call(
                    world.transports[1], world.transports[0].record(), AVERAGE, request, timeout_s=1, reply_limit=LIMIT
                )
        assert list(world.exchanges[0]._here) == [world.name()]
